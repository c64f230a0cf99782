//! Filling the cache from the hub: which files, from where, and whether they are what the hub and the lock
//! file name.
//!
//! How one file comes is left to `transfer`, where it goes to `store`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hf_hub::api::{RepoInfo, Siblings};
use pkv_core::{Progress, Stop, hinted};

use crate::cache::{Hub, Kind, Snapshot, differs, files_below};
use crate::client::Client;
use crate::failure::Asked;
use crate::hash::sha256_file;
use crate::listing::listing;
use crate::lock::{Pin, PinnedFile};
use crate::names;
use crate::redact::Secrets;
use crate::store::{Store, confined};
use crate::transfer::transfer;

/// Requested files of a repository.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub kind: Kind,
    pub name: &'a str,
    pub revision: &'a str,
    pub progress: &'a dyn Progress,
    pub stop: &'a Stop,
}

impl Hub {
    /// Download the files of a repository that `choose` picks from its listing, or take them from
    /// the cache, and verify them.
    ///
    /// A locked repository keeps its commit and its files; `choose` then sees the locked files.
    pub(crate) fn download(
        &self,
        wanted: Wanted,
        choose: impl Fn(&[String]) -> Result<Vec<String>>,
    ) -> Result<(Snapshot, Pin)> {
        self.downloaded(wanted, choose).map_err(|e| Secrets::of(&self.options).clean(e))
    }

    fn downloaded(
        &self,
        wanted: Wanted,
        choose: impl Fn(&[String]) -> Result<Vec<String>>,
    ) -> Result<(Snapshot, Pin)> {
        let Wanted { kind, name, revision, .. } = wanted;
        let pin = self.sound_pin(kind, name, revision)?;
        let client = Client::new(&self.options, self.options.implicit_token, wanted.stop)?;
        let info = match (&pin, self.options.offline) {
            // Nothing to ask the hub for if all locked files are here.
            (Some(pin), _) if self.has_all(kind, name, pin) => {
                RepoInfo { siblings: Vec::new(), sha: pin.commit.clone() }
            }
            (_, true) => self.cached_listing(kind, name, revision)?,
            _ => {
                let revision = pin.as_ref().map_or(revision, |p| &p.commit);
                let asked = Asked { kind, name, revision, file: None };
                listing(&client, asked).map_err(|e| e.explain(asked, &self.options))?
            }
        };
        let commit = info.sha;
        let present: Vec<String> = match &pin {
            Some(pin) => pin.files.keys().cloned().collect(),
            None => info.siblings.into_iter().map(|s| s.rfilename).collect(),
        };
        let chosen = choose(&present)?;
        for file in &chosen {
            names::check_file(file)
                .with_context(|| format!("cannot fetch all of {} `{name}`", kind.noun()))?;
        }

        let repository = self.repository_folder(kind, name);
        let store = Store::new(&self.options.cache, repository.clone());
        let folder = repository.join("snapshots").join(&commit);
        let mut files = BTreeMap::new();
        for file in &chosen {
            let place = folder.join(file);
            let one = || -> Result<PinnedFile> {
                if !place.is_file() {
                    ensure!(
                        !self.options.offline,
                        hinted(
                            format!("HF_HUB_OFFLINE is set, and `{}` is absent", place.display()),
                            "unset HF_HUB_OFFLINE, or copy the cache from a machine that reaches the hub"
                        )
                    );
                    let asked = Asked { kind, name, revision: &commit, file: Some(file) };
                    transfer(&client, &store, asked, file, wanted.progress)
                        .map_err(|e| e.explain(asked, &self.options))?;
                }
                confined(&repository, &place)?;
                let found = verified(&place, file, wanted.progress)?;
                if let Some(locked) = pin.as_ref().and_then(|p| p.files.get(file)) {
                    check_found(&place, &found, locked)?;
                }
                Ok(found)
            };
            let found =
                one().with_context(|| format!("cannot fetch `{file}` of {} `{name}`", kind.noun()))?;
            files.insert(file.clone(), found);
        }
        // A locked commit may be an older one, and the branch is not there any more.
        if pin.is_none() && commit != revision && !self.options.offline {
            let asked = Asked { kind, name, revision, file: None };
            store.note_branch(revision, &commit).map_err(|e| e.explain(asked, &self.options))?;
        }
        let asked = pin.map_or_else(|| revision.to_owned(), |p| p.asked);
        Ok((Snapshot { folder, commit: commit.clone() }, Pin { asked, commit, files }))
    }

    fn has_all(&self, kind: Kind, name: &str, pin: &Pin) -> bool {
        let folder = self.repository_folder(kind, name).join("snapshots").join(&pin.commit);
        pin.files.iter().all(|(f, p)| fs::metadata(folder.join(f)).is_ok_and(|m| m.len() == p.bytes))
    }

    /// Files of a repository in the cache, for use offline.
    fn cached_listing(&self, kind: Kind, name: &str, revision: &str) -> Result<RepoInfo> {
        let snapshot = self.snapshot(kind, name, revision).with_context(|| {
            hinted(
                format!("HF_HUB_OFFLINE is set, and {} `{name}` is not whole on this machine", kind.noun()),
                "unset HF_HUB_OFFLINE, or copy the cache from a machine that reaches the hub",
            )
        })?;
        let siblings =
            files_below(&snapshot.folder)?.into_iter().map(|rfilename| Siblings { rfilename }).collect();
        Ok(RepoInfo { siblings, sha: snapshot.commit })
    }
}

/// Length and hash of a file in its place; what differs from its own name is deleted.
fn verified(place: &Path, file: &str, progress: &dyn Progress) -> Result<PinnedFile> {
    progress.start(&format!("verifying {file}"), fs::metadata(place)?.len(), 0);
    let found = sha256_file(place, |n| progress.advance(n));
    progress.finish();
    let (bytes, sha256) = found?;
    // A blob of a large file is named by its SHA-256.
    let blob = fs::read_link(place).ok().and_then(|p| Some(p.file_name()?.to_str()?.to_owned()));
    if let Some(expected) = blob.filter(|b| b.len() == 64 && *b != sha256) {
        let deleted = fs::canonicalize(place).and_then(fs::remove_file).and_then(|()| fs::remove_file(place));
        bail!(hinted(
            format!("the transfer was damaged: expected sha256 {expected}, found {sha256}"),
            match deleted {
                Ok(()) => "run `proxykv-train fetch` again; the damaged file was deleted".to_owned(),
                Err(e) => format!("delete `{}` ({e}) and run `proxykv-train fetch` again", place.display()),
            }
        ));
    }
    Ok(PinnedFile { bytes, sha256 })
}

fn check_found(place: &Path, found: &PinnedFile, locked: &PinnedFile) -> Result<()> {
    ensure!(
        found.bytes == locked.bytes,
        differs(place, &format!("{} bytes", locked.bytes), &found.bytes.to_string())
    );
    ensure!(
        found.sha256 == locked.sha256,
        differs(place, &format!("sha256 {}", locked.sha256), &found.sha256)
    );
    Ok(())
}
