//! Every command block of README.md and docs/guide.md, and every example of `--help`, run as it is written,
//! in a folder that looks like the repository.
//!
//! The pair is the small one of the sandbox under the demo's name, so that all of it takes seconds. An HTML
//! comment above a block changes that: `<!-- not run: reason -->` leaves it out,
//! `<!-- run with: recipes/x.toml -->` runs it with the demo where it names the recipe x and its run folder.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::sandbox::{Ran, Sandbox, root};

const PAGES: [&str; 2] = ["README.md", "docs/guide.md"];

/// A fenced block, and what the comment above it says.
struct Block {
    line: usize,
    language: String,
    text: String,
    comment: Option<String>,
}

fn blocks(markdown: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut comment = None;
    let mut open: Option<Block> = None;
    for (i, line) in markdown.lines().enumerate() {
        if let Some(mut block) = open.take() {
            if line.trim() == "```" {
                found.push(block);
            } else {
                block.text.push_str(line);
                block.text.push('\n');
                open = Some(block);
            }
        } else if let Some(language) = line.trim().strip_prefix("```") {
            let language = language.to_owned();
            open = Some(Block { line: i + 1, language, text: String::new(), comment: comment.take() });
        } else if let Some(said) = line.trim().strip_prefix("<!--") {
            comment = Some(said.trim_end_matches("-->").trim().to_owned());
        } else if !line.trim().is_empty() {
            comment = None;
        }
    }
    assert!(open.is_none(), "a block is not closed");
    found
}

/// The sandbox as a clone of the repository: its documents and recipes, `target/release/proxykv-train`, and
/// finished runs.
fn clone() -> Sandbox {
    let s = Sandbox::new();
    let recipe = fs::read_to_string(s.path("recipe.toml")).unwrap();
    for folder in ["docs", "data-manifests", "scripts"] {
        symlink(root().join(folder), s.path(folder)).unwrap();
    }
    for entry in fs::read_dir(root().join("recipes")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        fs::create_dir_all(s.path("recipes")).unwrap();
        if name != "demo.toml" {
            symlink(root().join("recipes").join(&name), s.path(&format!("recipes/{name}"))).unwrap();
        }
    }
    let recipe =
        recipe.replace("name = \"small\"", "name = \"demo\"").replace("manifest.toml", "demo-manifest.toml");
    s.write("recipes/demo.toml", &recipe);
    fs::copy(s.path("manifest.toml"), s.path("demo-manifest.toml")).unwrap();
    for (i, document) in crate::sandbox::documents().split('\0').enumerate() {
        s.write(&format!("my/{i}.txt"), document);
    }
    s.write("book.txt", &"The harbour opens what the garden of part 3 needs. ".repeat(12));
    let program = format!(
        "#!/bin/sh\nexec '{}' --device cpu --threads 1 \"$@\"\n",
        env!("CARGO_BIN_EXE_proxykv-train")
    );
    s.write("target/release/proxykv-train", &program);
    let made = Command::new("chmod").arg("+x").arg(s.path("target/release/proxykv-train")).status().unwrap();
    assert!(made.success());
    Ran::new(s.command(&["run", "--recipe", "recipes/demo.toml"]).output().unwrap()).ok();
    for name in ["base", "ablation"] {
        let copied = Command::new("cp")
            .arg("-r")
            .arg(s.path("runs/demo"))
            .arg(s.path(&format!("runs/{name}")))
            .status();
        assert!(copied.unwrap().success());
    }
    s
}

fn run(s: &Sandbox, page: &str, block: &Block, text: &str) {
    s.write("block.sh", &format!("export PATH=\"$PWD/target/release:$PATH\"\n{text}"));
    let mut command = Command::new("bash");
    // The README's alias is one for the following lines.
    command.args(["-euo", "pipefail", "-O", "expand_aliases", "block.sh"]).current_dir(s.path(""));
    for name in ["RUST_LOG", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN"] {
        command.env_remove(name);
    }
    // A block that reaches for the hub must be marked.
    command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HOME", s.path("hf")).stdin(Stdio::null());
    let out = command.output().unwrap();
    assert!(
        out.status.success(),
        "the block at line {} of {page} fails:\n{text}\nstdout:\n{}\nstderr:\n{}",
        block.line,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn every_command_block_runs_as_it_is_written() {
    let s = clone();
    let mut ran = 0;
    for page in PAGES {
        let text = fs::read_to_string(root().join(page)).unwrap();
        for block in blocks(&text) {
            let comment = block.comment.as_deref().unwrap_or_default();
            if let Some(reason) = comment.strip_prefix("not run:") {
                assert!(reason.trim().len() > 10, "line {} of {page}: say why it is not run", block.line);
                continue;
            }
            match block.language.as_str() {
                "sh" => {
                    let named = comment.strip_prefix("run with:").map(|path| Path::new(path.trim()));
                    let text = match named.and_then(Path::file_stem) {
                        Some(stem) => {
                            let stem = stem.to_str().unwrap();
                            assert!(
                                block.text.contains(stem),
                                "line {} of {page} does not name {stem}",
                                block.line
                            );
                            block.text.replace(stem, "demo")
                        }
                        None => block.text.clone(),
                    };
                    run(&s, page, &block, &text);
                    ran += 1;
                }
                "toml" => {
                    s.write("block.toml", &block.text);
                    pkv_recipe::load_manifest(&s.path("block.toml"))
                        .unwrap_or_else(|e| panic!("line {} of {page}: {e:#}", block.line));
                }
                "text" => {}
                other => {
                    panic!("line {} of {page}: a block of `{other}` is neither run nor marked", block.line)
                }
            }
        }
    }
    assert!(ran >= 5, "{ran} blocks were run");
    for command in crate::sandbox::commands().iter().filter(|command| *command != "help") {
        let help = Ran::new(s.command(&[command, "--help"]).output().unwrap()).ok().stdout;
        let (_, examples) = help.split_once("Examples:\n").unwrap_or_else(|| panic!("{help}"));
        let lines: Vec<&str> = examples.lines().take_while(|line| line.starts_with("  ")).collect();
        // A line that ends in a backslash goes on in the next.
        let joined = lines.join("\n");
        let examples: Vec<&str> = joined.split("  proxykv-train ").skip(1).collect();
        assert!((1..=3).contains(&examples.len()), "{help}");
        for (i, example) in examples.iter().enumerate() {
            let (language, text) = ("sh".to_owned(), format!("proxykv-train {}\n", example.trim_end()));
            let block = Block { line: i + 1, language, text: text.clone(), comment: None };
            run(&s, &format!("the examples of `{command} --help`"), &block, &text);
        }
    }
}

/// The first page is read whole.
#[test]
fn the_readme_has_at_most_120_lines() {
    let lines = fs::read_to_string(root().join("README.md")).unwrap().lines().count();
    assert!(lines <= 120, "README.md has {lines} lines; what explains is for docs/");
}

/// On a bare machine the first command names all that is missing, and how to get it, before it downloads.
#[test]
fn the_set_up_names_all_that_is_missing_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for tool in ["bash", "dirname", "uname", "grep"] {
        let which = Command::new("sh").args(["-c", &format!("command -v {tool}")]).output().unwrap();
        symlink(String::from_utf8(which.stdout).unwrap().trim(), bin.join(tool)).unwrap();
    }
    let setup = folder.path().join("scripts/setup.sh");
    fs::create_dir(folder.path().join("scripts")).unwrap();
    fs::copy(root().join("scripts/setup.sh"), &setup).unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(bin.join("bash"));
        command.arg(&setup).args(args).env_clear().env("PATH", &bin).env("HOME", folder.path());
        let out = command.output().unwrap();
        assert_eq!(out.status.code(), Some(1));
        String::from_utf8(out.stderr).unwrap()
    };
    let said = run(&["--cpu"]);
    for part in [
        "cargo",
        "C++ compiler",
        "Python 3 with pip",
        "\nhint: ",
        "rustup.rs",
        "apt-get install g++ python3-pip",
    ] {
        assert!(said.contains(part), "`{part}` is missing in\n{said}");
    }
    // A program that is built already needs no compiler.
    let said = run(&["--cpu", "--run-only"]);
    assert!(said.contains("apt-get install python3-pip") && !said.contains("cargo"), "{said}");
    assert!(!folder.path().join("libtorch.partial").exists());
}

#[test]
fn an_archive_is_compared_with_its_hash_and_linked() {
    let folder = tempfile::tempdir().unwrap();
    let script = r#"
        mkdir -p new/app-1/scripts && printf '#!/bin/sh\necho works\n' > new/app-1/proxykv-train && chmod +x new/app-1/proxykv-train
        tar -C new -czf app-1.tar.gz app-1 && sha256sum app-1.tar.gz > app-1.tar.gz.sha256
        "$INSTALL" app-1.tar.gz && .local/bin/proxykv-train
        mkdir .local/share/proxykv-train/app-1/libtorch && "$INSTALL" app-1.tar.gz
        printf x >> app-1.tar.gz && ! "$INSTALL" app-1.tar.gz && .local/bin/proxykv-train && ls -A .local/share/proxykv-train"#;
    let mut command = Command::new("bash");
    command.args(["-euc", script]).current_dir(folder.path()).env("HOME", folder.path());
    let out = command.env("INSTALL", root().join("scripts/install.sh")).output().unwrap();
    let (said, errors) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert!(out.status.success(), "{said}{errors}");
    assert!(
        said.contains("app-1/scripts/setup.sh --run-only") && said.matches("works\n").count() == 2,
        "{said}"
    );
    assert!(said.contains("libtorch  /") && said.ends_with("works\napp-1\n"), "{said}");
    assert!(errors.contains("and should have"), "{errors}");
}

/// What an image's build sets is seen by the programs in it: cargo's libtorch is found by `LIBTORCH`.
#[test]
fn the_image_sets_no_variable_that_the_build_reads() {
    let file = fs::read_to_string(root().join("scripts/Dockerfile")).unwrap();
    let set = |line: &str| line.split_once(' ').map(|(_, rest)| rest.split('=').next().unwrap().to_owned());
    let args: Vec<String> = file.lines().filter(|line| line.starts_with("ARG ")).filter_map(set).collect();
    assert_eq!(args.len(), 1, "{args:?}");
    for name in args {
        assert!(!name.starts_with("LIBTORCH") && !name.starts_with("CARGO"), "cargo reads `{name}`");
        assert!(
            file.contains(&format!("--build-arg {name}=")),
            "the head does not say `--build-arg {name}=`"
        );
        assert!(file.contains(&format!("setup.sh ${name}")), "`{name}` is not used");
    }
}
