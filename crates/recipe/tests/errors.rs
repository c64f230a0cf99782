//! What a mistaken recipe or manifest is answered: the key, what was expected and found, and a hint.

use std::fs;

use pkv_core::Hinted;
use pkv_recipe::{AutoSteps, Override, Recipe, Steps, load, load_manifest, load_with_origins};
use pkv_test_support::errors::text_and_hint;

const RECIPE: &str = r#"
name = "pair"
seed = 3
[target]
model = "owner/large"
shape = { layers = 4, kv_heads = 2, query_heads = 4, head_dim = 8, hidden = 32, intermediate = 64, vocab = 100 }
[proxy]
model = "owner/small"
shape = { layers = 2, kv_heads = 1, query_heads = 2, head_dim = 8, hidden = 16, intermediate = 32, vocab = 100 }
[data]
manifest = "m.toml"
train = 10
validation = 2
test = 2
"#;

/// Load [`RECIPE`] with a line replaced by others (or `""` by lines at its end) and overrides.
fn with(from: &str, to: &str, overrides: &[&str]) -> anyhow::Result<Recipe> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pair.toml");
    let text = if from.is_empty() { format!("{RECIPE}{to}") } else { RECIPE.replace(from, to) };
    assert_ne!(text, RECIPE, "`{from}` is not in the recipe");
    fs::write(&path, text).unwrap();
    let overrides: Vec<_> = overrides.iter().map(|o| Override::from(*o)).collect();
    load(&path, &overrides)
}

fn overridden(overrides: &[&str]) -> anyhow::Result<Recipe> {
    with("", "\n", overrides)
}

/// The whole chain on one line, and the first hint in it.
fn texts<T>(result: anyhow::Result<T>) -> (String, String) {
    text_and_hint(&result.err().expect("a mistake was accepted"))
}

#[test]
fn what_no_one_can_have_written_is_not_parsed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(17 << 20).unwrap();
    for text in [texts(load(file.path(), &[])).0, texts(load_manifest(file.path())).0] {
        assert!(text.contains("it has 17825792 bytes, at most 16777216 are read"), "{text}");
    }
}

#[test]
fn unknown_keys_are_named_with_their_line() {
    let (text, hint) = texts(with("", "[train]\nstep = 3\n", &[]));
    assert!(
        text.contains("pair.toml`") && text.contains("unknown field `step`, expected one of `steps`"),
        "{text}"
    );
    assert!(text.contains("line 16, column 1"), "{text}");
    assert!(hint.contains("remove or rename the key"), "{hint}");
    let (text, _) = texts(with("seed = 3", "sed = 3", &[]));
    assert!(text.contains("unknown field `sed`"), "{text}");
    let (text, _) = texts(overridden(&["train.step=3"]));
    assert!(text.contains("unknown field `step`"), "{text}");
}

#[test]
fn a_ratio_of_15_is_met_with_what_was_meant() {
    for result in
        [with("", "[eval]\nratios = [0.5, 0.1, 15]\n", &[]), overridden(&["eval.ratios=[0.5, 0.1, 15]"])]
    {
        let (text, hint) = texts(result);
        assert!(
            text.contains(
                "`eval.ratios[2]`: a retention ratio is the kept share of KV pairs, 0 < ratio <= 1, found 15"
            ),
            "{text}"
        );
        assert_eq!(hint, "to keep 15% of the KV pairs, write `0.15`");
    }
    assert!(texts(overridden(&["eval.answer_ratios=[0]"])).0.contains("`eval.answer_ratios[0]`"));
    assert!(texts(overridden(&["train.best_by=[-0.1]"])).0.contains("`train.best_by[0]`"));
    assert!(texts(overridden(&["loss.binary_ratios=[1.5]"])).0.contains("`loss.binary_ratios[0]`"));
}

#[test]
fn training_keys_have_ranges() {
    for (key, value) in [
        ("crop", "0.0"),
        ("crop", "1.5"),
        ("feature_noise", "-0.1"),
        ("feature_dropout", "1.0"),
        ("dropout", "-0.2"),
        ("cache_gb", "-1.0"),
        ("loader_threads", "0"),
    ] {
        let (text, _) = texts(overridden(&[&format!("train.{key}={value}")]));
        assert!(text.contains(&format!("`train.{key}` is ")), "{key} = {value}: {text}");
    }
    assert!(texts(overridden(&["train.dtype=f16"])).0.contains("tf32"));
    let loading = overridden(&["train.cache_gb=0", "train.loader_threads=3"]).unwrap().train;
    assert_eq!(loading.choices(), overridden(&[]).unwrap().train);
    assert_ne!(overridden(&["train.dropout=0.1"]).unwrap().train.choices(), loading.choices());
}

#[test]
fn steps_are_a_number_or_auto() {
    let train = |overrides: &[&str]| overridden(overrides).map(|recipe| recipe.train);
    let auto = train(&["train.steps=auto"]).unwrap();
    assert_eq!((auto.steps, auto.most_steps()), (Steps::Auto, 20_000));
    assert_eq!(auto.steps_in_words(), "auto, at most 20000");
    assert_eq!(train(&["train.steps=\"auto\""]).unwrap(), auto);
    let set =
        ["train.steps=auto", "train.max_steps=90", "train.patience=2", "train.min_gain=0.5", "train.decay=1"];
    let AutoSteps { max_steps, patience, min_gain, decay } = train(&set).unwrap().auto().unwrap();
    assert_eq!((max_steps, patience, min_gain, decay), (90, 2, 0.5, 1.0));
    // What is resolved is read back.
    let resolved = overridden(&set).unwrap();
    let text = resolved.to_toml();
    assert!(text.contains("steps = \"auto\""), "{text}");
    assert_eq!(toml::from_str::<pkv_recipe::Recipe>(&text).unwrap().train, resolved.train);

    // Choices: a number is written as before, whatever `auto` would go by; a default of `auto` is spelt out.
    let number = train(&["train.patience=2"]).unwrap();
    assert_eq!(number.choices(), train(&[]).unwrap());
    let written = serde_json::to_value(number.choices()).unwrap();
    assert_eq!(written["steps"], 1500);
    for key in ["max_steps", "patience", "min_gain", "decay"] {
        assert!(written.get(key).is_none(), "`{key}` is new in the fingerprint of an old recipe");
        assert!(serde_json::to_value(auto.choices()).unwrap().get(key).is_some(), "`{key}` is missing");
    }
    assert_eq!(auto.choices(), train(&["train.steps=auto", "train.patience=4"]).unwrap().choices());

    for (assignment, expected) in [
        ("train.max_steps=0", "`train.max_steps` is 0"),
        ("train.patience=0", "`train.patience` is 0"),
        ("train.min_gain=-0.1", "`train.min_gain` is -0.1"),
        ("train.min_gain=nan", "`train.min_gain` is NaN"),
        ("train.decay=0", "`train.decay` is 0"),
        ("train.decay=1.5", "`train.decay` is 1.5"),
        ("data.validation=0", "nothing would end the training"),
    ] {
        let (text, hint) = texts(overridden(&["train.steps=auto", assignment]));
        assert!(text.contains(expected) && !hint.is_empty(), "{assignment}: {text}; {hint}");
    }
    for wrong in ["Auto", "automatic", "-1", "1.5", "[]"] {
        let (text, hint) = texts(overridden(&[&format!("train.steps={wrong}")]));
        assert!(text.contains("expected u64 or `auto`"), "{wrong}: {text}");
        assert!(hint.contains("`--set train.steps=3`, or `auto`"), "{wrong}: {hint}");
    }
}

#[test]
fn assignments_of_the_wrong_type_are_answered_with_the_right_form() {
    for (assignment, expected) in [
        ("eval.methods=mapper", r#"`--set 'eval.methods=["mapper"]'`"#),
        ("eval.methods=mapper,kvzip", r#"`--set 'eval.methods=["mapper", "kvzip"]'`"#),
        ("eval.methods=[mapper]", r#"`--set 'eval.methods=["mapper"]'`"#),
        ("data.window_tokens=300", "`--set 'data.window_tokens=[300]'`"),
        ("target.model=3", "`--set 'target.model=\"3\"'`"),
        ("train.steps=many", "`--set train.steps=3`"),
        ("train.steps=-3", "`--set train.steps=3`"),
        ("train.lr=fast", "`--set train.lr=0.5`"),
        ("facts.place=sentense", "did you mean `sentence`?"),
        ("trian.steps=3", "did you mean `train`?"),
        ("train.stepz=3", "did you mean `steps`?"),
        ("mapper=3", "`--set mapper=VALUE`"),
    ] {
        // Others beside it are right.
        let (text, hint) = texts(overridden(&["seed=4", assignment, "train.batch=3"]));
        assert!(
            text.contains("invalid recipe") && text.contains(&format!("cannot apply `--set {assignment}`")),
            "{text}"
        );
        assert!(hint.contains(expected), "{assignment}: {hint}");
    }
    // What an assignment supplies need not be in the file, and what is wrong there is no assignment's fault.
    assert!(with("train = 10\n", "", &["data.train=5"]).is_ok());
    let (text, hint) = texts(with("seed = 3", "sed = 3", &["train.batch=3"]));
    assert!(!text.contains("--set") && text.contains("line 3"), "{text}");
    assert!(hint.contains("did you mean `seed`?"), "{hint}");
}

#[test]
fn overrides_reach_every_section_and_need_no_quotes() {
    let recipe = overridden(&[
        "train.steps=7",
        "data.window_tokens=[300, 400]",
        "target.model=models/other folder",
        "proxy.shape.layers=3",
        "label.store=f32",
        "train.target_pool.width=5",
        "seed=9",
    ])
    .unwrap();
    let layers = recipe.proxy.as_ref().unwrap().shape.layers;
    assert_eq!((recipe.train.most_steps(), recipe.seed.0, layers), (7, 9, 3));
    assert_eq!(recipe.data.window_tokens, [300, 400]);
    assert_eq!(recipe.target.model, "models/other folder");
    assert_eq!((recipe.train.target_pool.width, recipe.train.target_pool.blend), (5, 0.5));
    // Nothing else changed.
    let plain = overridden(&[]).unwrap();
    assert_eq!((plain.eval, plain.mapper, plain.train.lr), (recipe.eval, recipe.mapper, recipe.train.lr));

    let (text, hint) = texts(overridden(&["train.steps"]));
    assert!(text.contains("cannot apply `--set train.steps`: there is no `=` in it"), "{text}");
    assert!(hint.contains("--set train.steps=500"), "{hint}");
    assert!(texts(overridden(&["=3"])).0.contains("the key is empty"));
    assert!(texts(overridden(&["name.first=3"])).0.contains("`name` is no section"));
    assert!(
        texts(overridden(&["train.steps=many"])).0.contains("invalid type: string \"many\", expected u64")
    );
}

#[test]
fn numbers_out_of_range_are_refused() {
    for (assignment, expected) in [
        ("data.train=0", "`data.train` is 0; a mapper needs examples to learn from"),
        ("data.stride=0", "`data.stride` is 0; it is a share of the window, 0 < stride <= 1"),
        ("data.stride=1.5", "`data.stride` is 1.5"),
        ("data.window_tokens=[]", "`data.window_tokens` is empty"),
        ("data.window_tokens=[100]", "`data.window_tokens[0]` is 100, shorter than `data.min_tokens` = 256"),
        (
            "data.test_window_tokens=100",
            "`data.test_window_tokens` is 100, shorter than `data.min_tokens` = 256",
        ),
        ("data.min_tokens=1", "`data.min_tokens` is 1; a context of one token has nothing to prune"),
        ("data.test_share=0.95", "no document is left for training"),
        ("data.validation_share=-0.1", "`data.validation_share` is -0.1"),
        ("proxy.shape.kv_heads=0", "`proxy.shape` holds a 0"),
        ("target.shape.query_heads=5", "`target.shape.query_heads` = 5 is no multiple of `kv_heads` = 2"),
        ("name=a/b", "`name` is `a/b`"),
        ("mapper.kernel=4", "`mapper.kernel` is 4; it must be odd to be centred"),
        ("mapper.attention_blocks=[4]", "`mapper.attention_blocks[0]` is 4, but there are 4 blocks"),
        ("train.lr=-1", "`train.lr` is -1; it must be positive"),
        ("train.ema=1", "`train.ema` is 1; it must be in [0, 1)"),
        ("train.target_pool.width=2", "`train.target_pool.width` is 2; it must be odd"),
        ("loss.binary=-1", "`loss.binary` is -1; a weight is 0 or more"),
        ("extract.channels=[\"max_all\", \"max_all\"]", "`extract.channels[1]` is named twice"),
        ("eval.context_tokens=100", "`eval.context_tokens` is 100; 8 facts need at least 320"),
        ("label.chunk_tokens=0", "`label.chunk_tokens` is 0"),
    ] {
        let (text, hint) = texts(overridden(&[assignment]));
        assert!(text.contains("invalid recipe") && text.contains(expected), "{assignment}: {text}");
        assert!(!hint.is_empty(), "{assignment} has no hint");
    }
}

#[test]
fn a_proxy_is_needed_where_features_come_from_one() {
    let (before, rest) = RECIPE.split_once("[proxy]").unwrap();
    let (proxy, data) = rest.split_once("[data]").unwrap();
    let section = format!("[proxy]{proxy}");
    for from in ["extract.from=[\"proxy\"]", "extract.from=[\"target\", \"proxy\"]"] {
        let (text, hint) = texts(with(&section, "", &[from]));
        assert!(text.contains("`extract.from`") && text.contains("no section `[proxy]`"), "{text}");
        assert!(hint.contains("extract.from = [\"target\"]"), "{hint}");
        assert!(with("", "# as it is\n", &[from]).unwrap().read_proxy().is_some());
    }
    assert!(with(&section, "", &[]).is_err(), "the proxy is the default source");
    let alone = ["extract.from=[\"target\"]"];
    let without = with(&section, "", &alone).unwrap();
    let unread = with("", "# as it is\n", &alone).unwrap();
    for recipe in [&without, &unread] {
        assert_eq!((recipe.read_proxy(), recipe.shapes().1), (None, None));
    }
    assert!(without.proxy.is_none() && unread.proxy.is_some());
    // Resolved, neither gains nor loses the section.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pair.toml");
    for text in [format!("{before}[data]{data}"), RECIPE.to_owned()] {
        fs::write(&path, text).unwrap();
        let (recipe, origins) = load_with_origins(&path, &alone.map(Override::from)).unwrap();
        fs::write(&path, recipe.explained(&origins)).unwrap();
        assert_eq!(load(&path, &[]).unwrap(), recipe);
    }
}

#[test]
fn absent_files_and_missing_keys_say_where_to_look() {
    let (text, hint) = texts(load(std::path::Path::new("none.toml"), &[]));
    assert!(text.starts_with("cannot read recipe `none.toml`: No such file"), "{text}");
    assert!(hint.contains("recipes/"), "{hint}");
    let (text, hint) = texts(with("train = 10\n", "", &[]));
    assert!(text.contains("missing field `train`") && hint.contains("add the key"), "{text}, {hint}");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bare.toml"), "name = \"bare\"\n[target]\nmodel = \"x\"\n").unwrap();
    let (text, hint) = texts(load(&dir.path().join("bare.toml"), &[]));
    assert!(text.contains("missing field `shape`") && hint.contains("recipes init"), "{text}, {hint}");
    for broken in
        ["name = pair", "name = \"pair", "name = [\"a\"", "name \"pair\"", "name = \"a\"\nname = \"b\""]
    {
        let (text, hint) = texts(with("name = \"pair\"", broken, &[]));
        assert!(text.contains("pair.toml`") && text.contains("TOML parse error at line "), "{text}");
        assert!(hint.contains("quotes"), "{hint}");
    }
    let (text, hint) = texts(with("train = 10", "train = \"10\"", &[]));
    assert!(text.contains("line 12") && hint.contains("usize"), "{text}, {hint}");
    let (text, hint) = texts(load_manifest(std::path::Path::new("none.toml")));
    assert!(text.starts_with("cannot read data manifest `none.toml`"), "{text}");
    assert!(hint.contains("data.manifest"), "{hint}");
}

#[test]
fn mistaken_manifests_are_refused() {
    const SOURCE: &str =
        "[[source]]\nname = \"a\"\nfiles = [\"a.txt\"]\nformat = \"txt\"\nlicence = \"CC0-1.0\"\n";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.toml");
    let read = |text: &str| {
        fs::write(&path, format!("description = \"d\"\n{text}")).unwrap();
        load_manifest(&path)
    };
    let good = read(SOURCE).unwrap();
    assert_eq!((good.sources[0].weight, good.sources[0].text.as_str(), &good.facts), (1.0, "text", &None));
    for (text, expected) in [
        (SOURCE.replace("files = [\"a.txt\"]", ""), "source `a` must have either `files` (local) or `hub`"),
        (
            SOURCE.replace("files", "hub = \"o/n\"\nfiles"),
            "source `a` must have either `files` (local) or `hub`",
        ),
        (
            SOURCE.replace("files = [\"a.txt\"]", "hub = \"o/n\""),
            "source `a` names the hub data set but no `hub_files`",
        ),
        (format!("{SOURCE}{SOURCE}"), "two sources are named `a`"),
        (format!("{SOURCE}weight = 0\n"), "source `a` has weight 0"),
        (format!("{SOURCE}weight = nan\n"), "source `a` has weight NaN"),
        (format!("{SOURCE}splits = []\n"), "source `a` serves no split"),
        (format!("{SOURCE}splits = [\"train\", \"validation\"]\n"), "no source serves the split \"test\""),
        (format!("{SOURCE}splits = [\"dev\"]\n"), "unknown variant `dev`"),
        (format!("{SOURCE}separator = \"\"\n"), "source `a` has an empty `separator`"),
        (
            SOURCE.replace("\"txt\"", "\"jsonl\"") + "separator = \"x\"\n",
            "source `a` has a `separator`, which only txt files have",
        ),
        (
            SOURCE.replace("\"txt\"", "\"csv\""),
            "unknown variant `csv`, expected one of `txt`, `jsonl`, `parquet`",
        ),
        (SOURCE.replace("licence = \"CC0-1.0\"\n", ""), "missing field `licence`"),
        (SOURCE.replace("name", "title"), "unknown field `title`"),
        (format!("{SOURCE}[facts]\nmin = 3\nmax = 2\n"), "`facts.min` = 3 is more than `facts.max` = 2"),
    ] {
        let error = read(&text).unwrap_err();
        assert!(
            error.downcast_ref::<Hinted>().is_some() || error.chain().any(|c| c.is::<Hinted>()),
            "{error:#}"
        );
        let error = format!("{error:#}");
        assert!(error.contains("invalid data manifest `") && error.contains(expected), "{text}: {error}");
    }
    assert!(format!("{:#}", read("source = []\n").unwrap_err()).contains("it has no `[[source]]`"));
}

#[test]
fn a_recipe_may_be_based_on_another() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    put("pair.toml", RECIPE);
    fs::create_dir(dir.path().join("tries")).unwrap();
    put(
        "tries/short.toml",
        "base = \"../pair.toml\"\nname = \"short\"\ntrain.steps = 7\n[data]\ntrain = 5\n",
    );
    put("tries/shorter.toml", "base = \"short.toml\"\nname = \"shorter\"\n[train]\nbatch = 3\n");
    let recipe = load(&dir.path().join("tries/shorter.toml"), &["train.batch=4".into()]).unwrap();
    assert_eq!((recipe.name.as_str(), recipe.data.train, recipe.data.validation), ("shorter", 5, 2));
    assert_eq!((recipe.train.most_steps(), recipe.train.batch), (7, 4));
    assert!(recipe.path.ends_with("tries/shorter.toml"));

    put("wrong.toml", "base = \"pair.toml\"\nname = \"wrong\"\ntrain.stepps = 7\n");
    let (text, hint) = texts(load(&dir.path().join("wrong.toml"), &[]));
    assert!(text.contains("line 3 of `") && text.contains("wrong.toml") && text.contains("stepps"), "{text}");
    assert!(hint.contains("did you mean `steps`?"), "{hint}");
    put("under.toml", "base = \"wrong.toml\"\nname = \"under\"\n");
    let (text, _) = texts(load(&dir.path().join("under.toml"), &[]));
    assert!(text.contains("invalid recipe `") && text.contains("under.toml`: line 3 of `"), "{text}");
    put("broken.toml", "base = \"pair.toml\"\nname = \"broken\n");
    put("on-broken.toml", "base = \"broken.toml\"\nname = \"on\"\n");
    let (text, hint) = texts(load(&dir.path().join("on-broken.toml"), &[]));
    assert!(
        text.contains("broken.toml") && text.contains("line 2") && hint.contains("quotes"),
        "{text}, {hint}"
    );
    put("lost.toml", "base = \"absent.toml\"\nname = \"lost\"\n");
    let (text, _) = texts(load(&dir.path().join("lost.toml"), &[]));
    assert!(text.contains("`base` of recipe") && text.contains("absent.toml"), "{text}");
    put("round.toml", "base = \"round.toml\"\nname = \"round\"\n");
    let (text, hint) = texts(load(&dir.path().join("round.toml"), &[]));
    assert!(text.contains("in a row") && hint.contains("based on each other"), "{text}");
    put("number.toml", "base = 3\nname = \"number\"\n");
    assert!(texts(load(&dir.path().join("number.toml"), &[])).0.contains("is no text"));
}

#[test]
fn sizes_and_lists_have_upper_bounds() {
    let many = format!("mapper.dilations=[{}]", vec!["1"; 100_000].join(","));
    for (set, expected) in [
        (many.as_str(), "`mapper.dilations` has 100000 entries; at most 256"),
        ("mapper.dilations=[1,1000000000]", "`mapper.dilations` is 1000000000; at most 1048576"),
        ("mapper.kernel=1000000001", "`mapper.kernel` is 1000000001; at most"),
        ("mapper.width=1000000000", "`mapper.width` is 1000000000; at most"),
        ("loss.fine_pairs.pairs=1000000000000", "`loss.fine_pairs.pairs` is 1000000000000; at most"),
        ("train.loader_threads=1000000", "`train.loader_threads` is 1000000; at most"),
        ("eval.bootstrap=1000000000", "`eval.bootstrap` is 1000000000; at most"),
        ("target.shape.layers=2000000000", "`target.shape.layers` is 2000000000; at most"),
        ("train.lr=inf", "`train.lr` is inf; it must be a finite number"),
    ] {
        let (said, hint) = texts(overridden(&[set]));
        assert!(said.contains(expected) && !hint.is_empty(), "{said}");
    }
    overridden(&["seed=9000000000000000000", "mapper.dilations=[1,2,4,8,16,32]"]).unwrap();
}

#[test]
fn a_recipe_that_is_no_file_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.toml");
    for base in ["/dev/zero", "."] {
        std::fs::write(&recipe, format!("base = \"{base}\"\n")).unwrap();
        let (said, hint) = texts(pkv_recipe::load(&recipe, &[]));
        assert!(said.contains("cannot read recipe") && said.contains("expected a"), "{said}");
        assert!(!hint.is_empty());
    }
    let (said, hint) = texts(pkv_recipe::load_manifest(std::path::Path::new("/dev/zero")));
    assert!(said.contains("a device, pipe or socket") && !hint.is_empty(), "{said}");
}

#[test]
fn the_place_of_a_bad_value_is_named() {
    let limit = Override::by_flag("--limit 0", "eval.contexts=0");
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    put("base.toml", &format!("{RECIPE}\n[train]\nlr = -1.0\n"));
    put("own.toml", "base = \"base.toml\"\nname = \"own\"\n[eval]\nratios = [0.5, 2]\n");
    let at = |name: &str, set: &[Override]| texts(load(&dir.path().join(name), set));
    let (said, hint) = at("base.toml", &[]);
    assert!(said.contains("line 17 of `") && said.contains("base.toml`: `train.lr` is -1"), "{said}, {hint}");
    let (said, _) = at("own.toml", &["train.lr=0.1".into()]);
    assert!(
        said.contains("line 4 of `") && said.contains("own.toml`") && said.contains("eval.ratios[1]"),
        "{said}"
    );
    // A value of the command line is not the file's.
    put("own.toml", "base = \"base.toml\"\nname = \"own\"\n[train]\nlr = 0.1\n");
    for (set, expected) in [
        (limit, "own.toml`: cannot apply `--limit 0`: `eval.contexts` is 0"),
        ("train.lr=-2".into(), "own.toml`: cannot apply `--set train.lr=-2`: `train.lr` is -2"),
        (
            Override::by_flag("--policies pairs", "eval.policies=[\"pairs\"]"),
            "cannot apply `--policies pairs`",
        ),
    ] {
        let (said, hint) = at("own.toml", &[set]);
        assert!(said.contains(expected) && !said.contains(": line ") && !hint.is_empty(), "{said}");
        assert_eq!(hint.contains("1 or more"), expected.contains("--limit 0"), "{hint}");
    }
}

#[test]
fn a_key_of_another_section_is_named_with_it() {
    for (set, expected) in [
        ("patience=3", "did you mean `train.patience`?"),
        ("train.place=anywhere", "did you mean `facts.place`?"),
        ("mapper.cache_gb=2", "did you mean `train.cache_gb`?"),
        ("lable.store=f32", "did you mean `label`?"),
    ] {
        let (said, hint) = texts(overridden(&[set]));
        assert!(hint.contains(expected), "{said}, {hint}");
    }
    let (said, hint) = texts(with("", "patience = 3\n", &[]));
    assert!(hint.contains("`train.patience`"), "{said}, {hint}");
}

#[test]
fn a_resolved_recipe_says_where_each_value_is_from_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    put("base.toml", RECIPE);
    put("own.toml", "base = \"base.toml\"\nname = \"own\"\n[train]\nlr = 0.1\n");
    let set = Override::by_flag("--limit 3", "eval.contexts=3");
    let (recipe, origins) = load_with_origins(&dir.path().join("own.toml"), &[set]).unwrap();
    let text = recipe.explained(&origins);
    let line = |start: &str| {
        text.lines().find(|l| l.starts_with(start)).unwrap_or_else(|| panic!("{start}\n{text}"))
    };
    assert!(line("lr = ").contains("own.toml, line 4"), "{text}");
    assert!(
        line("seed = ").contains("base.toml, line 3") && line("contexts = ").ends_with("# --limit 3"),
        "{text}"
    );
    assert!(
        line("hidden = ").contains("base.toml, line 6") && line("beta1 = ").ends_with("# default"),
        "{text}"
    );
    assert!(text.contains("\n# max_steps =\n") && text.contains("# Peak learning rate."), "{text}");
    put("again.toml", &text);
    let again = load(&dir.path().join("again.toml"), &[]).unwrap();
    assert_eq!(Recipe { path: recipe.path.clone(), ..again }, recipe);
    let json = recipe.explained_json(&origins);
    assert_eq!(json["origins"]["eval.contexts"], "--limit 3");
    assert_eq!(
        (&json["origins"]["train.lr"]["line"], &json["recipe"]["train"]["lr"]),
        (&4.into(), &0.1.into())
    );
}
