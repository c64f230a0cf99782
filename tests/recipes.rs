//! Recipes for people: the schema and the reference, those that come along, a new one for a pair, documents
//! without a manifest, and what will be asked, shown before it is.

use std::fs;

use serde_json::{Value, json};

use crate::sandbox::{Ran, Sandbox, documents, root};

fn command(s: &Sandbox, args: &[&str]) -> Ran {
    Ran::new(s.command(args).output().unwrap())
}

#[test]
fn the_reference_in_the_repository_is_the_one_that_the_program_writes() {
    let s = Sandbox::new();
    let written = command(&s, &["schema", "--reference"]).ok().stdout;
    let kept = fs::read_to_string(root().join("docs/recipes.md")).unwrap();
    let same = written == kept;
    assert!(same, "docs/recipes.md is stale: `proxykv-train schema --reference > docs/recipes.md`");
    for part in
        ["| `lr` | number | `0.002` |", "## [loss.fine_pairs]", "| `kvzip` |", "`{ tokens = whole number }`"]
    {
        assert!(written.contains(part), "`{part}` is missing");
    }
}

#[test]
fn the_schema_knows_every_key_of_the_recipes_that_come_along() {
    let s = Sandbox::new();
    let schema: Value = serde_json::from_str(&command(&s, &["schema"]).ok().stdout).unwrap();
    let follow = |value: &Value| match value["$ref"].as_str() {
        Some(name) => schema.pointer(&name[1..]).unwrap().clone(),
        None => value.clone(),
    };
    fn walk(table: &toml::Table, of: &Value, follow: &dyn Fn(&Value) -> Value, path: &str) -> usize {
        let mut keys = 0;
        for (name, value) in table {
            let known = &of["properties"][name];
            assert!(!known.is_null(), "`{path}{name}` is not in the schema");
            keys += 1;
            let known = follow(known);
            if let (Some(inner), true) = (value.as_table(), known["properties"].is_object()) {
                keys += walk(inner, &known, follow, &format!("{path}{name}."));
            }
        }
        keys
    }
    let mut keys = 0;
    for file in fs::read_dir(root().join("recipes")).unwrap() {
        let path = file.unwrap().path();
        let name = path.to_string_lossy().into_owned();
        if name.ends_with(".toml") && !name.ends_with(".lock.toml") {
            let table: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
            keys += walk(&table, &schema, &follow, "");
        }
    }
    assert!(keys > 200, "{keys} keys");
    let methods = &schema["$defs"]["EvalSection"]["properties"]["methods"]["items"]["oneOf"];
    assert!(methods.as_array().unwrap().iter().any(|m| m["const"] == "snapkv"), "{methods}");
}

#[test]
fn recipes_are_listed_and_shown() {
    let s = Sandbox::new();
    let unlike = command(&s, &["recipes", "show", "zzz"]).fails_with(&["there is no recipe `zzz`"]).stderr;
    assert!(!unlike.contains("did you mean"), "{unlike}");
    // None here: those beside the program, which the tests run from the repository's own target folder.
    fs::create_dir(s.path("recipes")).unwrap();
    fs::copy(s.path("recipe.toml"), s.path("recipes/mine.toml")).unwrap();
    s.write("recipes/more/broken.toml", "name = 3\n");
    s.write("recipes/mine.lock.toml", "version = 1\n");
    // What another is based on is no recipe by itself.
    s.write("recipes/more/shared.toml", "[train]\nsteps = 5\n");
    let based = "base = \"more/shared.toml\"\nname = \"based\"";
    let own = fs::read_to_string(s.path("recipe.toml")).unwrap();
    s.write("recipes/other.toml", &own.replacen("name = \"small\"", based, 1));
    let listed = command(&s, &["recipes", "ls"]).ok().stdout;
    assert_eq!(listed.lines().count(), 3, "{listed}");
    assert!(listed.contains("recipes/mine.toml") && listed.contains("nano-llama/target, proxy "), "{listed}");
    assert!(!listed.contains("shared.toml"), "{listed}");
    assert!(listed.contains("broken.toml") && listed.contains("cannot be read: invalid recipe"), "{listed}");
    let rows: Value = serde_json::from_str(&command(&s, &["recipes", "ls", "--json"]).ok().stdout).unwrap();
    assert_eq!((&rows[0]["name"], &rows[0]["features"]), (&json!("mine"), &json!(["proxy"])));
    assert!(command(&s, &["recipes", "show", "mine"]).ok().stdout.contains("name = \"small\""));
    // A name without its folder, and a misspelled one.
    for named in ["mine", "recipes/mines.toml"] {
        command(&s, &["plan", "--recipe", named]).fails_with(&[
            "cannot read recipe",
            "did you mean `recipes/mine.toml`?",
            "recipes ls",
        ]);
    }
    let far = command(&s, &["plan", "--recipe", "qqq"]);
    let far = far.fails_with(&["cannot read recipe", "recipes ls"]).stderr;
    assert!(!far.contains("did you mean"), "{far}");
    command(&s, &["recipes", "show", "nime"])
        .fails_with(&["there is no recipe `nime`", "did you mean `mine`?"]);
    // A part of several names is none of them.
    let several = command(&s, &["recipes", "show", "e"]).fails_with(&["there is no recipe `e`"]).stderr;
    assert!(!several.contains("did you mean"), "{several}");
    // Without the flag, too, it is said where recipes are.
    for args in [&["run"][..], &["run", "mine"], &["plan", "recipes/mine.toml"]] {
        let ran = Ran::new(s.command(args).output().unwrap());
        assert!(ran.stderr.contains("`--recipe recipes/demo.toml`"), "{args:?}\n{}", ran.stderr);
    }
    // A key is of a recipe: without one it would be passed over.
    let no_recipe = Ran::new(s.command(&["doctor", "--set", "train.steps=3"]).output().unwrap());
    assert_eq!(no_recipe.code, 2, "{}", no_recipe.stderr);
    let other = Ran::new(s.command(&["inspect"]).output().unwrap());
    assert!(!other.stderr.contains("--recipe"), "{}", other.stderr);
    // Many variants in a folder are one line.
    for i in 0..6 {
        s.write(&format!("recipes/many/v{i}.toml"), &own);
    }
    let listed = command(&s, &["recipes", "ls"]).ok().stdout;
    assert_eq!(listed.lines().count(), 4, "{listed}");
    assert!(listed.contains("6 variants, for `sweep --variants recipes/many`"), "{listed}");
    // In a terminal no line is wider than it is; a machine gets the same as ever.
    let script = format!("stty cols 60 rows 40; '{}' recipes ls", env!("CARGO_BIN_EXE_proxykv-train"));
    let mut shown = std::process::Command::new("script");
    let shown = shown.args(["-qec", &script, "/dev/null"]).current_dir(s.path("")).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("recipes/mine.toml") && shown.lines().count() > 6, "{shown}");
    let is_path = |line: &str| line.trim().contains('/') && !line.trim().contains(' ');
    assert!(shown.lines().all(|line| line.trim_end().chars().count() <= 60 || is_path(line)), "{shown}");
    // A proxy that is not read is not named.
    s.write("recipes/other.toml", "base = \"mine.toml\"\nname = \"other\"\n[extract]\nfrom = [\"target\"]\n");
    let listed = command(&s, &["recipes", "ls"]).ok().stdout;
    let other = listed.lines().find(|line| line.starts_with("recipes/other.toml")).unwrap();
    assert!(other.ends_with("nano-llama/target"), "{other}");
}

#[test]
fn a_recipe_for_a_pair_has_the_shapes_of_its_models() {
    let s = Sandbox::new();
    let pair = root().join("recipes/nano-llama");
    let (target, proxy) = (pair.join("target"), pair.join("proxy"));
    let models = ["--target", target.to_str().unwrap(), "--proxy", proxy.to_str().unwrap()];
    let init = |more: &[&str]| command(&s, &[&["recipes", "init"], &models[..], more].concat());
    // Documents that are absent are missed before anything is written.
    init(&["--data", "my/*.txt", "--out", "new/own.toml"]).fails_with(&["`my/*.txt`", "was not written"]);
    assert!(!s.path("new").exists());
    s.write("my/a.txt", "some text");
    let ran = init(&["--data", "my/*.txt", "--out", "new/own.toml"]).ok();
    assert!(
        ran.stdout.starts_with("new/own.toml\nnext: proxykv-train doctor --recipe new/own.toml"),
        "{}",
        ran.stdout
    );
    let first = fs::read_to_string(s.path("new/own.toml")).unwrap();
    let recipe: toml::Table = first.parse().unwrap();
    let shape = |role: &str, key: &str| recipe[role]["shape"][key].as_integer().unwrap();
    assert_eq!(
        (shape("target", "layers"), shape("target", "vocab"), shape("proxy", "kv_heads")),
        (6, 4096, 1)
    );
    assert_eq!(recipe["data"]["files"].as_array().unwrap().len(), 1);
    assert!(first.contains("# ") && recipe["name"].as_str() == Some("target--proxy"));
    // All that the recipes of published models share is in it.
    let shared = fs::read_to_string(root().join("recipes/base/target-features.toml")).unwrap();
    for (section, keys) in &shared.parse::<toml::Table>().unwrap() {
        for (key, value) in keys.as_table().unwrap() {
            assert_eq!(recipe[section].get(key), Some(value), "{section}.{key}");
        }
    }
    // What is there stays.
    init(&["--out", "new/own.toml"]).fails_with(&["it is there already", "new/own.toml"]);
    assert_eq!(fs::read_to_string(s.path("new/own.toml")).unwrap(), first);
    for out in ["x.toml", "-"] {
        init(&["--out", out, "--name", "a/b"]).fails_with(&["was not written", "--name"]);
    }
    assert!(!s.path("x.toml").exists());
    // One model; stdout.
    let alone =
        command(&s, &["recipes", "init", "--target", target.to_str().unwrap(), "--out", "-"]).ok().stdout;
    assert!(alone.contains("from = [\"target\"]") && !alone.contains("[proxy]"), "{alone}");
    command(&s, &["recipes", "init", "--target", "./nowhere"]).fails_with(&["the target `./nowhere`"]);
    // The new recipe plans.
    command(&s, &["plan", "--recipe", "new/own.toml"]).ok();
    s.write(
        "alone.toml",
        &alone.replace("manifest = \"data-manifests/long-documents.toml\"", "files = [\"my/*.txt\"]"),
    );
    let Ran { stdout: planned, stderr, .. } = command(&s, &["plan", "--recipe", "alone.toml"]).ok();
    assert!(stderr.is_empty(), "the plan says for which machine it is: {stderr}");
    assert!(planned.contains("  target ") && !planned.contains("  proxy "), "{planned}");
}

#[test]
fn documents_need_no_manifest() {
    let s = Sandbox::new();
    let docs: Vec<String> = documents().split('\0').map(str::to_owned).collect();
    for (i, text) in docs.iter().enumerate().take(30) {
        s.write(&format!("my/{i}.txt"), text);
    }
    let lines: Vec<String> = docs[30..].iter().map(|d| json!({ "text": d }).to_string()).collect();
    s.write("more/rest.jsonl", &lines.join("\n"));
    s.edit("recipe.toml", "manifest = \"manifest.toml\"\n", "");
    s.run(&["prepare"]).fails_with(&["there are no documents", "--data 'my/*.txt'"]);
    let data = ["prepare", "--data", "my/*.txt", "more/rest.jsonl"];
    let ran = s.run(&data).ok();
    assert!(ran.stderr.contains("examples 16"), "{}", ran.stderr);
    let run = fs::read_to_string(s.path("runs/small/run.json")).unwrap();
    assert!(run.contains("\"name\": \"txt\"") && run.contains("\"name\": \"jsonl\""), "{run}");
    // The same files match, others do not, and say so.
    assert!(s.run(&data).ok().stderr.contains("skipped"));
    s.run(&["prepare", "--data", "my/*.txt"]).fails_with(&["data.files", "--redo prepare"]);
    s.run(&["prepare", "--data", "my"]).fails_with(&["`my` does not say", "`my/*.txt`"]);
    s.run(&["prepare", "--data", "a.json"]).fails_with(&["JSON lines"]);
    s.run(&["prepare", "--redo", "prepare", "--data", "none/*.txt"])
        .fails_with(&["no file matches `none/*.txt`"]);
}

#[test]
fn examples_and_prompts_are_shown_as_they_will_be_read() {
    let s = Sandbox::new();
    s.edit("manifest.toml", "min = 0", "min = 1");
    // A document that would steer a terminal.
    s.write("documents.txt", &documents().replace("Notes", "\u{1b}]0;owned\u{7}Notes"));
    s.run(&["eval", "--show", "1"]).fails_with(&["`prepare` has not run"]);
    let ran = s.run(&["prepare", "--show", "2"]).ok();
    assert_eq!(ran.stdout.matches("=== example ").count(), 2, "{}", ran.stdout);
    assert!(ran.stdout.contains("--- fact at token ") && ran.stdout.contains("what the"), "{}", ran.stdout);
    let ran = s.run(&[
        "eval",
        "--show",
        "1",
        "--set",
        "eval.benchmark.ruler_tokens=1500",
        "--tasks",
        "facts,perplexity,ruler/vt",
    ]);
    let ran = ran.ok();
    for part in [
        "=== facts, context 0",
        "=== perplexity, context 0",
        "=== ruler/vt, context 0",
        "wanted: \"",
        "--- then: \"\\n\\n",
    ] {
        assert!(ran.stdout.contains(part), "`{part}` is missing\n{}", ran.stdout);
    }
    for text in [&ran.stdout, &s.run(&["prepare", "--show", "2"]).ok().stdout] {
        assert!(!text.contains(|c: char| c.is_control() && !"\n\t".contains(c)), "{text:?}");
    }
    assert!(!s.path("runs/small/eval").exists(), "nothing is measured");
    let shown: Value = serde_json::from_str(&s.run(&["eval", "--show", "1", "--json"]).ok().stdout).unwrap();
    assert!(shown[0]["asked"][0]["prompt"].as_str().unwrap().starts_with("\n\n"), "{shown}");
    s.run(&["prepare", "--show", "0"]).fails_with(&["`--show 0` shows nothing"]);
}

#[test]
fn the_place_of_a_bad_value_is_the_flag_the_option_or_the_line() {
    let s = Sandbox::new();
    for (args, expected) in [
        (&["eval", "--tasks", "fact"][..], &["cannot apply `--tasks fact`", "did you mean `facts`?"][..]),
        (&["eval", "--limit", "0"], &["cannot apply `--limit 0`"]),
        (&["plan", "--set", "train.lr=-1"], &["cannot apply `--set train.lr=-1`", "`train.lr` is -1"]),
        (
            &["plan", "--set", "eval.methods=[\"snapvk\"]"],
            &["cannot apply `--set eval.methods", "did you mean `snapkv`?"],
        ),
        (&["plan", "--set", "patience=3"], &["did you mean `train.patience`?"]),
    ] {
        s.run(args).fails_with(expected);
    }
    s.edit("recipe.toml", "\nratios = [0.2, 0.05]", "\nratios = [0.2, 7]");
    let text = fs::read_to_string(s.path("recipe.toml")).unwrap();
    let line = 1 + text.lines().position(|line| line.starts_with("ratios")).unwrap();
    let place = format!("line {line} of `recipe.toml`");
    s.run(&["plan", "--set", "train.lr=1"]).fails_with(&[&place, "eval.ratios[1]"]);
}

#[test]
fn a_resolved_recipe_is_explained_and_is_the_same_recipe() {
    let s = Sandbox::new();
    let first = s.run(&["plan", "--resolved", "--set", "train.lr=0.5"]).ok().stdout;
    assert!(
        first.contains("lr = 0.5  # --set train.lr=0.5")
            && first.contains("steps = 24  # recipe.toml, line ")
    );
    s.write("again.toml", &first);
    let values = |recipe: &str| -> Value {
        let ran = command(&s, &["plan", "--resolved", "--json", "--recipe", recipe]).ok();
        serde_json::from_str::<Value>(&ran.stdout).unwrap()["recipe"].clone()
    };
    let mut expected = values("recipe.toml");
    expected["train"]["lr"] = json!(0.5);
    assert_eq!(values("again.toml"), expected);
}

#[test]
fn the_guide_has_what_plan_says_of_the_recipes() {
    let guide = fs::read_to_string(root().join("docs/guide.md")).unwrap();
    let (_, rows) = guide.split_once("| recipe | target | GPU memory").expect("the guide has the table");
    let mut seen = 0;
    for row in rows.lines().skip(2).take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let recipe = root().join("recipes").join(format!("{}.toml", cells[0]));
        let recipe = recipe.to_str().unwrap();
        let s = Sandbox::new();
        let plan = command(&s, &["--json", "plan", "--machine", "h100", "--recipe", recipe]).ok().stdout;
        let plan: Value = serde_json::from_str(&plan).unwrap();
        let stages = plan["stages"].as_array().unwrap();
        let of = |key: &str| stages.iter().filter_map(|stage| stage[key].as_f64()).collect::<Vec<_>>();
        let expected = [
            of("peak_bytes").into_iter().fold(0.0, f64::max) / 1e9,
            of("secs").iter().sum::<f64>() / 60.0,
            of("disk_bytes").iter().sum::<f64>() / 1e9,
        ];
        let expected = expected.map(|figure| format!("{figure:.0}"));
        assert_eq!(cells[2..], expected, "{row}");
        seen += 1;
    }
    assert!(seen > 5, "{seen} rows");
}
