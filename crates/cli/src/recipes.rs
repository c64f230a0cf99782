//! `recipes`: lists and shows the recipes that come with the program, and writes one for a pair whose shapes
//! are read from config.json.
//!
//! The meaning of keys is in the reference (`schema --reference`).

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_core::{Stop, hinted};
use pkv_hub::Hub;
use pkv_lm::LmConfig;
use pkv_recipe::{DEEPEST, Manifest, toml_files};
use pkv_run::session::{load_recipe, load_with_origins};
use serde_json::{Value, json};

use crate::args::{Cli, InitArgs, RecipesCommand};
use crate::output;
use crate::terminal::{self, Bar};
use crate::wrapped::wrapped;

/// # Errors
/// There are no recipes, a model cannot be read, or the file to write is there already.
pub fn run(cli: &Cli, what: &RecipesCommand, stop: &Stop) -> Result<()> {
    match what {
        RecipesCommand::Ls => ls(cli),
        RecipesCommand::Show { name } => show(name),
        RecipesCommand::Init(args) => init(cli, args, stop),
    }
}

/// Recipe files of the working directory's `recipes/`, else of the one that came with the program.
///
/// # Errors
/// There is no such folder.
pub fn files() -> Result<Vec<PathBuf>> {
    let program = std::env::current_exe().unwrap_or_default();
    // In an archive the folder is beside the program; in a clone it is above target/release/.
    let beside = program.ancestors().skip(1).take(3).map(|folder| folder.join("recipes"));
    let folder = std::iter::once(PathBuf::from("recipes")).chain(beside).find(|folder| folder.is_dir());
    let folder = folder.with_context(|| {
        hinted(
            "there is no folder `recipes`, neither here nor beside the program",
            "go to the folder of the project, or write a recipe with `proxykv-train recipes init`",
        )
    })?;
    let mut all = Vec::new();
    toml_files(&folder, DEEPEST, &mut all);
    all.retain(|path| !path.to_string_lossy().ends_with(".lock.toml"));
    // Those of folders below come last.
    all.sort_by_key(|path| (path.components().count(), path.clone()));
    Ok(all)
}

fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

fn ls(cli: &Cli) -> Result<()> {
    let (mut rows, mut bases): (Vec<Value>, Vec<PathBuf>) = Default::default();
    for path in files()? {
        let shown = path.display().to_string();
        rows.push(match load_with_origins(&path, &[]) {
            Ok((recipe, origins)) => {
                bases.extend(origins.bases().map(Path::to_owned));
                json!({
                    "name": stem(&path), "file": shown, "target": recipe.target.model,
                    "proxy": recipe.proxy.as_ref().map(|proxy| &proxy.model),
                    "features": recipe.extract.from.iter().map(|s| s.name()).collect::<Vec<_>>(),
                })
            }
            Err(e) => json!({"name": stem(&path), "file": shown, "error": format!("{e:#}").split_whitespace().collect::<Vec<_>>().join(" ")}),
        });
    }
    // What others are based on need not be whole.
    let is_base = |row: &Value| bases.iter().any(|base| row["file"] == base.display().to_string());
    rows.retain(|row| row.get("error").is_none() || !is_base(row));
    let columns = terminal::width(&io::stdout(), &console::Term::stdout());
    output::print_either(cli.json, &rows, || table(&rows, columns))
}

/// From this many recipes on, a folder below `recipes/` is one line.
const MANY: usize = 6;

/// A line for each recipe, and one for each folder of [`MANY`] variants. A proxy is named where features come
/// from it. A line that is wider than the terminal is broken.
fn table(rows: &[Value], columns: Option<usize>) -> String {
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let folder = |row: &Value| Path::new(&text(row, "file")).parent().map(Path::to_owned).unwrap_or_default();
    let top = rows.first().map(folder).unwrap_or_default();
    let mut folders: Vec<(PathBuf, usize)> = Vec::new();
    for row in rows.iter().filter(|row| row.get("error").is_none() && folder(row) != top) {
        match folders.iter_mut().find(|(path, _)| *path == folder(row)) {
            Some((_, count)) => *count += 1,
            None => folders.push((folder(row), 1)),
        }
    }
    folders.retain(|(_, count)| *count >= MANY);
    let is_folded = |row: &Value| row.get("error").is_none() && folders.iter().any(|f| f.0 == folder(row));
    let rows: Vec<&Value> = rows.iter().filter(|row| !is_folded(row)).collect();
    let width = rows.iter().map(|row| text(row, "file").chars().count()).max().unwrap_or(0);
    let line = |row: &&Value| {
        let file = text(row, "file");
        let is_read = row["features"].as_array().is_some_and(|all| all.contains(&json!("proxy")));
        let proxy = match row["proxy"].as_str() {
            Some(proxy) if is_read => format!(", proxy {proxy}"),
            _ => String::new(),
        };
        match row["error"].as_str() {
            Some(error) => format!("{file:width$}  cannot be read: {error}\n"),
            None => format!("{file:width$}  {}{proxy}\n", text(row, "target")),
        }
    };
    let mut out: String = rows.iter().map(line).collect();
    for (path, count) in folders {
        let path = path.display().to_string();
        let _ = writeln!(out, "{path:width$}  {count} variants, for `sweep --variants {path}`");
    }
    let Some(columns) = columns.filter(|&columns| out.lines().any(|line| line.chars().count() > columns))
    else {
        return out;
    };
    let lines = out.lines().map(|line| {
        let (file, what) = line.split_at(line.find("  ").unwrap_or(line.len()));
        wrapped(&format!("{file}\n    {}\n", what.trim_start()), columns, 4)
    });
    lines.collect()
}

fn show(name: &str) -> Result<()> {
    let named = Path::new(name);
    let path = if named.is_file() {
        named.to_path_buf()
    } else {
        let all = files()?;
        let found = all.iter().find(|path| stem(path) == name).cloned();
        found.with_context(|| {
            let alike = |stem: &String| strsim::jaro_winkler(stem, name);
            let mut near: Vec<String> = all.iter().map(|path| stem(path)).collect();
            // A part of several names means none of them, and what is unlike all was not misspelled.
            if near.iter().filter(|stem| stem.contains(name)).count() > 1 {
                near.clear();
            }
            near.retain(|stem| alike(stem) > 0.65);
            let near = near.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
            let near = near.map_or_else(String::new, |near| format!("did you mean `{near}`? "));
            hinted(
                format!("there is no recipe `{name}`"),
                format!("{near}`proxykv-train recipes ls` lists them"),
            )
        })?
    };
    output::print(&pkv_core::read_small_text(&path)?)
}

/// A model's config.json and what its recipe calls it.
fn model(role: &str, name: &str, stop: &Stop) -> Result<LmConfig> {
    let folder = Hub::from_env()
        .fetch_config(name, "main", &[Path::new("")], &Bar::new(), stop)
        .and_then(|folder| LmConfig::from_folder(&folder));
    folder.with_context(|| format!("cannot read the shape of the {role} `{name}`"))
}

fn init(cli: &Cli, args: &InitArgs, stop: &Stop) -> Result<()> {
    if !args.data.is_empty() {
        let documents = Manifest::of_files(&args.data).context("cannot use `--data`")?;
        for source in &documents.sources {
            pkv_data::files(&documents, source, &Hub::from_env())
                .context("the recipe was not written: its documents are absent")?;
        }
    }
    let target = model("target", &args.target, stop)?;
    let proxy = args.proxy.as_deref().map(|name| Ok((name, model("proxy", name, stop)?)));
    let proxy: Option<(&str, LmConfig)> = proxy.transpose().map_err(|e: anyhow::Error| e)?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let name = args.name.clone().unwrap_or_else(|| {
        let of = |model: &str| {
            let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_lowercase();
            last.chars().map(|c| if is_plain(c) { c } else { '-' }).collect::<String>()
        };
        let proxy = proxy.as_ref().map(|(name, _)| format!("--{}", of(name))).unwrap_or_default();
        format!("{}{proxy}", of(&args.target))
    });
    ensure!(
        !name.is_empty() && name.chars().all(is_plain),
        hinted(
            format!("`{name}` cannot name a run folder: the recipe was not written"),
            "name the pair with `--name`: letters, digits, `-`, `_` and `.`"
        )
    );
    let text = recipe_text(&name, &args.target, &target, proxy.as_ref().map(|(n, c)| (*n, c)), &args.data);
    if args.out.as_deref() == Some(Path::new("-")) {
        return output::print_either(cli.json, &json!({"name": name, "recipe": text}), || text.clone());
    }
    let path = args.out.clone().unwrap_or_else(|| {
        let folder = if Path::new("recipes").is_dir() { "recipes" } else { "" };
        Path::new(folder).join(format!("{name}.toml"))
    });
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
    }
    let mut file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(|e| {
        let (why, hint) = match e.kind() {
            ErrorKind::AlreadyExists => {
                ("it is there already", "name another file with `--out`, or remove it")
            }
            _ => ("it cannot be made", "name a file in a folder that you may write, with `--out`"),
        };
        anyhow::Error::from(e)
            .context(hinted(format!("cannot write the recipe `{}`: {why}", path.display()), hint))
    })?;
    file.write_all(text.as_bytes()).with_context(|| format!("cannot write `{}`", path.display()))?;
    // A shape that does not fit is found now.
    if let Err(e) = load_recipe(&path, &[]) {
        fs::remove_file(&path).with_context(|| format!("cannot remove `{}`", path.display()))?;
        return Err(e.context("the recipe would not be valid, and was not written"));
    }
    let shown = path.display();
    output::print_either(cli.json, &json!({"name": name, "file": shown.to_string()}), || {
        format!(
            "{shown}\nnext: proxykv-train doctor --recipe {shown}\n      proxykv-train plan --recipe {shown}\n"
        )
    })
}

/// A recipe with the reasons of its values beside them.
fn recipe_text(
    name: &str,
    target_name: &str,
    target: &LmConfig,
    proxy: Option<(&str, &LmConfig)>,
    data: &[String],
) -> String {
    // As JSON: TOML spells texts alike.
    let quoted = |text: &str| Value::from(text).to_string();
    let section = |role: &str, model: &str, config: &LmConfig| {
        let s = &config.shape;
        format!(
            "[{role}]\nmodel = {}\n\n[{role}.shape]\nlayers = {}\nkv_heads = {}\nquery_heads = {}\nhead_dim = {}\nhidden = {}\n\
             intermediate = {}\nvocab = {}\n\n",
            quoted(model),
            s.layers,
            s.kv_heads,
            s.query_heads,
            s.head_dim,
            s.hidden,
            s.intermediate,
            s.vocab
        )
    };
    let second = proxy.map_or(String::new(), |(model, config)| section("proxy", model, config));
    let documents = match data {
        [] => "# Documents to train on: a manifest, or `files = [\"my/*.txt\"]` in its place.\nmanifest = \"data-manifests/long-documents.toml\"".to_owned(),
        files => format!(
            "# Train on every kind of text that you serve.\nfiles = [{}]",
            files.iter().map(|f| quoted(f)).collect::<Vec<_>>().join(", ")
        ),
    };
    // The model's own limit less room for the chat template, questions and answers.
    let longest = target.max_positions.saturating_sub(512).max(320);
    let mut windows: Vec<usize> = [1024, 2048, 4096].into_iter().filter(|w| *w <= longest).collect();
    if windows.is_empty() {
        windows.push(longest);
    }
    let window = windows.last().copied().unwrap_or(longest);
    let least = windows[0].min(800);
    format!(
        "# Written by `proxykv-train recipes init`; every key: docs/recipes.md, or `proxykv-train plan --resolved`.\n\n\
         name = {}\n\n# Shapes as the models' config.json has them.\n{}{second}[data]\n{documents}\n\
         # Contexts of each split. `plan` says what more of them cost.\ntrain = 600\n{}\n\
         # Several lengths, so that the mapper sees what changes with length. Train as long as you serve.\n\
         window_tokens = {windows:?}\ntest_window_tokens = {window}\nmin_tokens = {least}\n\n\
         {}[eval]\n{}\n# Questions are asked of contexts of this length.\ncontext_tokens = {window}\n",
        quoted(name),
        section("target", target_name, target),
        shared("data"),
        ["extract", "mapper", "loss", "train"].map(|of| format!("[{of}]\n{}\n\n", shared(of))).concat(),
        shared("eval"),
    )
}

/// What the recipes of published models share.
const SHARED: &str = include_str!("../../../recipes/base/target-features.toml");

/// The lines of one section of [`SHARED`].
fn shared(section: &str) -> &'static str {
    let body = SHARED.split_once(&format!("[{section}]\n")).map_or("", |(_, rest)| rest);
    body.split_once("\n[").map_or(body, |(body, _)| body).trim()
}
