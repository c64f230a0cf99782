//! `push`: an export with its model card into a hub repository. Nothing is sent without `--yes`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use pkv_checkpoint::{BUDGETS_FILE, EXPORT_FILES, Export};
use pkv_core::{Stop, hinted};
use pkv_hub::{Hub, Push, PushFile, Pushed};
use pkv_recipe::plan::human_bytes;
use pkv_run::mapper_source::export_of_run;
use serde_json::{Value, json};

use crate::args::{Cli, PushArgs};
use crate::output;
use crate::terminal::Bar;

pub fn run(cli: &Cli, args: &PushArgs, stop: &Stop) -> Result<()> {
    let folder = export_folder(&args.source)?;
    let export = Export::read(&folder)?;
    export.check()?;
    let message =
        args.message.clone().unwrap_or_else(|| format!("Upload the mapper of `{}`", export.config().name));
    let mut files: Vec<&str> =
        EXPORT_FILES.into_iter().chain(export.budgets().map(|_| BUDGETS_FILE)).collect();
    files.sort_unstable();
    let push = Push {
        repo: args.repo.clone(),
        revision: args.revision.clone(),
        private: args.private,
        message,
        files: files.iter().map(|name| PushFile::read(&folder, name)).collect::<Result<_>>()?,
    };
    push.check()?;
    let hub = Hub::from_env();
    if !args.yes {
        return show(cli, || dry_run(&hub, &push, &folder), || as_json(&hub, &push, &folder));
    }
    let done = hub.push(&push, &Bar::new(), stop)?;
    show(
        cli,
        || in_words(&push, &done),
        || {
            let mut value = as_json(&hub, &push, &folder);
            value["dry_run"] = json!(false);
            value["url"] = json!(done.url);
            value["commit"] = json!(done.commit);
            value["created"] = json!(done.created);
            value["sent"] = json!(done.sent);
            value["kept"] = json!(done.kept);
            value
        },
    )
}

fn show(cli: &Cli, text: impl FnOnce() -> String, json: impl FnOnce() -> Value) -> Result<()> {
    if cli.json { output::print_json(&json()) } else { output::print(&text()) }
}

/// The export that `source` is, or that the run folder `source` holds.
fn export_folder(source: &Path) -> Result<PathBuf> {
    if let Some(export) = export_of_run(source)? {
        return Ok(export);
    }
    if !source.is_dir() {
        bail!(hinted(
            format!("there is no folder `{}`", source.display()),
            "name a run folder (`runs/<name>`) or an export (`runs/<name>/export`)"
        ));
    }
    Ok(source.to_path_buf())
}

fn dry_run(hub: &Hub, push: &Push, folder: &Path) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "export `{}`, whole and sound, to `{}`, branch `{}`, of `{}`\n",
        folder.display(),
        push.repo,
        push.revision,
        hub.options().endpoint
    );
    for f in &push.files {
        let _ = writeln!(out, "  {:<20} {:>10}  sha256 {}", f.name, human_bytes(f.bytes), f.sha256);
    }
    let visibility = if push.private { "private" } else { "public" };
    let _ = writeln!(
        out,
        "\nwould: make the repository ({visibility}) and the branch if they are absent; leave out files that are there \
         already;\n       add the others in one commit, \"{}\"",
        push.message
    );
    for (wrong, what) in [
        (hub.options().token.is_none(), "there is no token: set HF_TOKEN or HF_TOKEN_PATH before you send"),
        (hub.options().offline, "HF_HUB_OFFLINE is set: unset it before you send"),
        (
            unlicensed(push),
            "the card states no licence: set `export.licence` in the recipe and run `proxykv-train export`",
        ),
    ] {
        if wrong {
            let _ = writeln!(out, "note:  {what}");
        }
    }
    let _ = writeln!(out, "\ndry run: nothing was sent; `--yes` sends it");
    out
}

fn unlicensed(push: &Push) -> bool {
    let card = push.files.iter().find(|f| f.name == "README.md");
    let text = card.and_then(|f| pkv_core::read_small_text(&f.path).ok()).unwrap_or_default();
    text.lines().any(|l| l == "license: unknown")
}

fn in_words(push: &Push, done: &Pushed) -> String {
    let list = |names: &[String]| names.join(", ");
    let mut out = String::new();
    if done.sent.is_empty() {
        let _ = writeln!(out, "nothing to send: commit {} has all {} files", done.commit, done.kept.len());
    } else {
        let new = if done.created { " new" } else { "" };
        let _ = writeln!(out, "sent to{new} `{}` as commit {}: {}", push.repo, done.commit, list(&done.sent));
        if !done.kept.is_empty() {
            let _ = writeln!(out, "there already: {}", list(&done.kept));
        }
    }
    let _ = writeln!(out, "{}", done.url);
    out
}

fn as_json(hub: &Hub, push: &Push, folder: &Path) -> Value {
    let file = |f: &PushFile| json!({"name": f.name, "bytes": f.bytes, "sha256": f.sha256});
    json!({
        "dry_run": true,
        "export": folder,
        "endpoint": hub.options().endpoint,
        "repo": push.repo,
        "revision": push.revision,
        "private": push.private,
        "message": push.message,
        "token": hub.options().token.is_some(),
        "files": push.files.iter().map(file).collect::<Vec<_>>(),
    })
}
