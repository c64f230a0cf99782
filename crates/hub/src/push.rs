//! Files of this machine into a hub repository, as one commit or not at all.
//!
//! hf-hub 0.5 only downloads, so the hub's own HTTP interface is spoken here: large files go to the
//! storage first ([`lfs`]), which changes nothing that a reader of the repository sees; then one
//! request commits all of them. An upload that breaks off leaves the branch where it was, and the next
//! one sends only what has not arrived. Which files make an export, and whether it is sound, is left
//! to the caller.
//!
//! The interface: `huggingface_hub`'s `create_commit` (`_commit_api.py`, `lfs.py`) and the Git LFS
//! batch specification.

mod api;
mod lfs;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pkv_core::{Progress, Stop, hinted};
use serde_json::{Value, json};

use crate::address::quoted;
use crate::cache::Hub;
use crate::failure::Failure;
use crate::hash::{git_blob, sha256_bytes, sha256_file};
use crate::redact::Secrets;
use api::Api;

/// Bytes at a file's beginning from which the hub tells text from binary.
const SAMPLE: u64 = 512;

/// Files to send, and their repository and branch.
#[derive(Clone, Debug)]
pub struct Push {
    /// `owner/name`; made if the hub has no such repository.
    pub repo: String,
    /// Branch that the commit goes to; made if absent.
    pub revision: String,
    /// Make the repository private; an existing public one is refused.
    pub private: bool,
    /// First line of the commit's message.
    pub message: String,
    pub files: Vec<PushFile>,
}

/// A file to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushFile {
    /// Path in the repository.
    pub name: String,
    pub path: PathBuf,
    pub bytes: u64,
    pub sha256: String,
}

/// Outcome of a push.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Page of the repository at that branch.
    pub url: String,
    /// The branch's commit afterwards.
    pub commit: String,
    /// The repository is new.
    pub created: bool,
    /// Files that are in the commit.
    pub sent: Vec<String>,
    /// Files that the branch had already, byte for byte.
    pub kept: Vec<String>,
}

/// Transfer mode of a file, as the hub decided.
struct Remote<'a> {
    file: &'a PushFile,
    lfs: bool,
    /// Content that the branch has under this name: SHA-256 of a large file, git's blob hash of another.
    has: Option<String>,
}

impl PushFile {
    /// The file `name` of `folder`, measured.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let (bytes, sha256) = sha256_file(&path, |_| ())?;
        Ok(Self { name: name.to_owned(), path, bytes, sha256 })
    }

    fn sample(&self) -> Result<Vec<u8>> {
        let mut sample = Vec::new();
        File::open(&self.path)
            .and_then(|f| f.take(SAMPLE).read_to_end(&mut sample))
            .with_context(|| format!("cannot read `{}`", self.path.display()))?;
        Ok(sample)
    }

    /// The content, which must still be what was measured.
    fn content(&self) -> Result<Vec<u8>> {
        let content =
            fs::read(&self.path).with_context(|| format!("cannot read `{}`", self.path.display()))?;
        ensure!(sha256_bytes(&content) == self.sha256, self.changed());
        Ok(content)
    }

    fn changed(&self) -> pkv_core::Hinted {
        hinted(
            format!("`{}` changed while it was being sent; nothing was committed", self.path.display()),
            "wait until nothing writes to that folder any more, and push again",
        )
    }
}

impl Push {
    /// # Errors
    /// The repository or the branch cannot be called so.
    pub fn check(&self) -> Result<()> {
        let part = |p: &str| {
            !p.is_empty()
                && p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !p.starts_with(['-', '.'])
                && !p.ends_with(['-', '.'])
                && !p.contains("--")
                && !p.contains("..")
        };
        let named = self.repo.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name));
        ensure!(
            named && self.repo.len() <= 96,
            hinted(
                format!("`{}` is no name of a hub repository", self.repo),
                "write `owner/name` in letters, digits, `-`, `_` and `.`; \
                 neither part begins or ends with `-` or `.` or repeats them"
            )
        );
        let branch = &self.revision;
        ensure!(
            !branch.is_empty()
                && !branch.starts_with(['-', '/', '.'])
                && !branch.ends_with(['/', '.'])
                && !branch.contains("..")
                && branch.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c)),
            hinted(format!("`{branch}` is no name of a branch"), "name a branch, such as `main`")
        );
        ensure!(
            !self.message.trim().is_empty(),
            hinted("the commit's message is empty", "say what changed, or leave `--message` out")
        );
        Ok(())
    }
}

impl Hub {
    /// The page of a repository at a branch.
    pub fn page(&self, repo: &str, revision: &str) -> String {
        match revision {
            "main" => format!("{}/{repo}", self.options.endpoint),
            _ => format!("{}/{repo}/tree/{}", self.options.endpoint, quoted(revision)),
        }
    }

    /// Bring `push.files` into the repository by one commit; files that are there already are not sent.
    ///
    /// `stop` is checked before every request that changes something.
    ///
    /// # Errors
    /// There is no token, it may not write there, or the hub cannot be reached: the branch is as it was.
    pub fn push(&self, push: &Push, progress: &dyn Progress, stop: &Stop) -> Result<Pushed> {
        self.pushed(push, progress, stop).map_err(|e| Secrets::of(&self.options).clean(e))
    }

    fn pushed(&self, push: &Push, progress: &dyn Progress, stop: &Stop) -> Result<Pushed> {
        push.check()?;
        let api = Api::new(&self.options, stop)?;
        stop.check()?;
        let created = open_repository(&api, push)?;
        let mut attempts = api.client.attempts();
        loop {
            attempts.made += 1;
            let parent = open_branch(&api, push)?;
            let (kept, changed): (Vec<_>, Vec<_>) =
                compare(&api, push)?.into_iter().partition(Remote::is_current);
            let names = |remotes: &[Remote]| remotes.iter().map(|r| r.file.name.clone()).collect();
            let mut pushed = Pushed {
                url: self.page(&push.repo, &push.revision),
                commit: parent.clone(),
                created,
                sent: names(&changed),
                kept: names(&kept),
            };
            if changed.is_empty() {
                return Ok(pushed);
            }
            let large: Vec<&PushFile> = changed.iter().filter(|r| r.lfs).map(|r| r.file).collect();
            lfs::upload(&api, push, &large, progress, stop)?;
            let body = commit_body(push, &parent, &changed)?;
            stop.check()?;
            let path = format!("/api/models/{}/commit/{}", push.repo, quoted(&push.revision));
            // A commit whose answer was lost may have happened, and another one may have come first (412):
            // both are seen by comparing again.
            let reply = api.commit(&path, body.as_bytes());
            if let Err(failure) = &reply
                && (failure.is_passing() || matches!(failure, Failure::Status(r) if r.status == 412))
                && api.client.pause("committing", &mut attempts, failure)?
            {
                continue;
            }
            let doing = format!("cannot commit to `{}`", push.repo);
            let reply = api.expect(reply, &push.repo, &doing)?;
            reply.json["commitOid"].as_str().unwrap_or(&parent).clone_into(&mut pushed.commit);
            return Ok(pushed);
        }
    }
}

impl Remote<'_> {
    fn is_current(&self) -> bool {
        let Some(has) = &self.has else { return false };
        match self.lfs {
            true => *has == self.file.sha256,
            false => self.file.content().is_ok_and(|content| *has == git_blob(&content)),
        }
    }
}

/// Make sure that the repository is there, and not more public than asked; whether it was made now.
fn open_repository(api: &Api, push: &Push) -> Result<bool> {
    let path = format!("/api/models/{}", push.repo);
    let look = || api.get(&path);
    let doing = format!("cannot open repository `{}`", push.repo);
    let mut found = api.answer(look(), &push.repo, &doing)?;
    let mut created = false;
    if found.status == 404 {
        let (owner, name) = push.repo.split_once('/').unwrap_or_default();
        let request = json!({"type": "model", "organization": owner, "name": name, "private": push.private});
        let reply = api.post("/api/repos/create", &request);
        let doing = format!("cannot create repository `{}`", push.repo);
        let reply = api.answer(reply, &push.repo, &doing)?;
        // 409: another client created it meanwhile, or an attempt of ours whose answer was lost.
        if reply.status != 409 {
            api.expect(Ok(reply), &push.repo, &doing)?;
            created = true;
        }
        found = api.answer(look(), &push.repo, &doing)?;
    }
    let found = api.expect(Ok(found), &push.repo, &doing)?;
    ensure!(
        !push.private || found.json["private"] == true,
        hinted(
            format!("`{}` is public, and `--private` was asked for; nothing was sent", push.repo),
            format!(
                "make it private at {}/{}/settings, choose another name, or leave `--private` out",
                api.endpoint(),
                push.repo
            )
        )
    );
    Ok(created)
}

/// The commit that the branch points at; the branch is made, from the default one, if it is not there.
fn open_branch(api: &Api, push: &Push) -> Result<String> {
    let branch = quoted(&push.revision);
    let path = format!("/api/models/{}/revision/{branch}", push.repo);
    let doing = format!("cannot open branch `{}` of `{}`", push.revision, push.repo);
    let look = || api.answer(api.get(&path), &push.repo, &doing);
    let mut found = look()?;
    if found.status == 404 {
        let path = format!("/api/models/{}/branch/{branch}", push.repo);
        let made = api.answer(
            api.post(&path, &json!({})),
            &push.repo,
            &format!("cannot make branch `{}` of `{}`", push.revision, push.repo),
        )?;
        if made.status != 409 {
            api.expect(Ok(made), &push.repo, &doing)?;
        }
        found = look()?;
    }
    let found = api.expect(Ok(found), &push.repo, &doing)?;
    let commit = found.json["sha"].as_str().with_context(|| {
        hinted(format!("{doing}: the hub named no commit"), "check that HF_ENDPOINT is a hub's address")
    })?;
    Ok(commit.to_owned())
}

/// Ask how each file should travel, and what the branch has in its place.
fn compare<'a>(api: &Api, push: &'a Push) -> Result<Vec<Remote<'a>>> {
    let doing = format!("cannot prepare the upload to `{}`", push.repo);
    let mut files = Vec::new();
    for f in &push.files {
        let sample = STANDARD.encode(f.sample()?);
        files.push(json!({"path": f.name, "size": f.bytes, "sha": f.sha256, "sample": sample}));
    }
    let path = format!("/api/models/{}/preupload/{}", push.repo, quoted(&push.revision));
    let reply = api.expect(api.post(&path, &json!({"files": files})), &push.repo, &doing)?;
    let listed = reply.json["files"].as_array().map_or(&[][..], Vec::as_slice);
    let one = |file: &'a PushFile| -> Result<Remote<'a>> {
        let found = listed.iter().find(|t| t["path"] == file.name.as_str());
        let mode = found.and_then(|t| t["uploadMode"].as_str());
        let lfs = match mode {
            Some("lfs") => file.bytes > 0, // The storage takes no empty files.
            Some("regular") => false,
            _ => bail!(hinted(
                format!("{doing}: the hub did not say how to send `{}`", file.name),
                "check that HF_ENDPOINT is a hub's address"
            )),
        };
        ensure!(
            found.is_none_or(|t| t["shouldIgnore"] != true),
            hinted(
                format!("the repository's .gitignore leaves out `{}`", file.name),
                format!("remove that line from .gitignore in `{}`", push.repo)
            )
        );
        let has = found.and_then(|t| t["oid"].as_str()).map(str::to_owned);
        Ok(Remote { file, lfs, has })
    };
    push.files.iter().map(one).collect()
}

/// The commit's lines: what it says, then each file or the name of its stored content.
fn commit_body(push: &Push, parent: &str, files: &[Remote]) -> Result<String> {
    let header = json!({"summary": push.message, "description": "", "parentCommit": parent});
    let mut lines = vec![json!({"key": "header", "value": header})];
    for Remote { file, lfs, .. } in files {
        lines.push(match lfs {
            true => json!({"key": "lfsFile", "value":
                {"path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.bytes}}),
            false => json!({"key": "file", "value":
                {"path": file.name, "encoding": "base64", "content": STANDARD.encode(file.content()?)}}),
        });
    }
    Ok(lines.iter().map(Value::to_string).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(repo: &str, revision: &str) -> Push {
        Push {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            private: false,
            message: "m".to_owned(),
            files: Vec::new(),
        }
    }

    #[test]
    fn names_are_those_that_the_hub_takes() {
        for good in ["owner/name", "o/Llama-3.1_8b.v2"] {
            push(good, "main").check().unwrap();
        }
        let long = format!("o/{}", "x".repeat(95));
        for bad in ["name", "a/b/c", "/b", "a/", "a/-b", "a/b.", "a/b--c", "a/..", "a b/c", long.as_str()] {
            assert!(push(bad, "main").check().is_err(), "{bad}");
        }
        push("a/b", "feature/x-1").check().unwrap();
        for bad in ["", "-x", "a..b", "a b", "x/", "refs?x"] {
            assert!(push("a/b", bad).check().is_err(), "{bad}");
        }
        assert!(Push { message: " ".to_owned(), ..push("a/b", "main") }.check().is_err());
    }

    #[test]
    fn blobs_are_named_as_git_names_them() {
        // `git hash-object` of an empty file and of "hello\n".
        assert_eq!(git_blob(b""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        assert_eq!(git_blob(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
    }
}
