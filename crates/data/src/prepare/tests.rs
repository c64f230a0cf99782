//! `prepare` on small texts and an encoder of one token per word, where every example can be foreseen.

use std::collections::{HashMap, HashSet};
use std::fs;

use pkv_core::{NoProgress, Seed};
use pkv_hub::HubOptions;
use pkv_recipe::{DataSection, FactPlace};
use tempfile::TempDir;

use super::*;

/// One token per word: its number if it is one, so that tests can read the tokens.
fn encode(text: &str) -> Result<Vec<u32>> {
    Ok(text.split_whitespace().map(|w| w.parse().unwrap_or(u32::MAX)).collect())
}

fn decode(tokens: &[u32]) -> Result<String> {
    Ok(tokens.iter().map(|t| if *t == u32::MAX { " word".to_owned() } else { format!(" {t}") }).collect())
}

fn planter(place: FactPlace) -> Planter<'static> {
    Planter { place, encode: &encode, decode: &decode }
}

struct Setting {
    dir: TempDir,
    data: DataSection,
    place: FactPlace,
}

impl Setting {
    /// `[data]` beside its counts, and the manifest's lines.
    fn new(data: &str, manifest: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = "model = \"m\"\nshape = { layers = 1, kv_heads = 1, query_heads = 1, head_dim = 8, hidden = 8, intermediate = 8, vocab = 8 }\n";
        let recipe =
            format!("name = \"r\"\n[target]\n{model}[proxy]\n{model}[data]\nmanifest = \"m.toml\"\n{data}");
        fs::write(dir.path().join("r.toml"), recipe).unwrap();
        fs::write(dir.path().join("m.toml"), format!("description = \"test\"\n{manifest}")).unwrap();
        let data = pkv_recipe::load(&dir.path().join("r.toml"), &[]).unwrap().data;
        Self { dir, data, place: FactPlace::Sentence }
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.dir.path().join(name), content).unwrap();
    }

    fn run(&self, seed: u64) -> Result<(Vec<Example>, PrepareSummary)> {
        let manifest = pkv_recipe::load_manifest(&self.dir.path().join("m.toml"))?;
        let hub =
            Hub::new(HubOptions { cache: self.dir.path().into(), offline: true, ..HubOptions::from_env() });
        let reading = Reading { data: &self.data, seed: Seed(seed), encode: &encode, progress: &NoProgress };
        let mut examples = Vec::new();
        let summary = Preparation::new(&manifest, &hub, reading, planter(self.place))?.run(&mut |e| {
            examples.push(e);
            Ok(())
        })?;
        Ok((examples, summary))
    }

    fn error(&self) -> String {
        format!("{:#}", self.run(1).unwrap_err())
    }
}

const SOURCE: &str = "[[source]]\nname = \"docs\"\nfiles = [\"docs.txt\"]\nformat = \"txt\"\nseparator = \"\\u0000\"\nlicence = \"CC0-1.0\"\n";
const DATA: &str = "train = 30\nvalidation = 8\ntest = 8\nwindow_tokens = [20, 30]\nmin_tokens = 10\nvalidation_share = 0.2\ntest_share = 0.2\n";

/// Document `d` of `length` words: 1000 d, 1000 d + 1, ...
fn document(d: usize, length: usize) -> String {
    (0..length).map(|i| (1000 * d + i).to_string()).collect::<Vec<_>>().join(" ")
}

fn documents(count: usize) -> String {
    (1..=count).map(|d| document(d, 40 + d % 37)).collect::<Vec<_>>().join("\0")
}

#[test]
fn examples_are_windows_of_their_documents() {
    let setting = Setting::new(DATA, SOURCE);
    setting.write("docs.txt", documents(60));
    let (examples, summary) = setting.run(1).unwrap();
    let splits: Vec<_> = examples.iter().map(|e| e.split).collect();
    let expected = [vec![Split::Train; 30], vec![Split::Validation; 8], vec![Split::Test; 8]].concat();
    assert_eq!(splits, expected, "all training examples, then validation, then test");
    let mut split_of = HashMap::new();
    let mut windows_seen = HashSet::new();
    for e in &examples {
        let d = e.tokens[0] / 1000;
        let first = d * 1000 + e.start as u32;
        let consecutive: Vec<u32> = (first..first + e.tokens.len() as u32).collect();
        assert_eq!(e.tokens, consecutive, "{}", e.id);
        assert_eq!(*split_of.entry(d).or_insert(e.split), e.split, "document {d} is in two splits");
        assert_eq!(
            split_of[&d],
            DocumentHash::of(&document(d as usize, 40 + d as usize % 37)).split(&setting.data)
        );
        assert!(windows_seen.insert((d, e.window)), "window {} of document {d} came twice", e.window);
        let document_length = 40 + d as usize % 37;
        let fits = |window: usize| {
            let to_the_end = e.start as usize + e.tokens.len() == document_length && e.tokens.len() < window;
            e.start as usize == e.window as usize * window && (e.tokens.len() == window || to_the_end)
        };
        assert!(fits(20) || fits(30), "{e:?}");
        assert!(e.tokens.len() >= 10 && e.facts.is_empty() && e.source == "docs");
    }
    assert_eq!(examples.iter().map(|e| &e.id).collect::<HashSet<_>>().len(), 46);
    assert_eq!((examples[0].id.as_str(), examples[30].id.as_str()), ("train-000000", "validation-000000"));
    assert_eq!((summary.examples, summary.facts), (46, 0));
    assert_eq!(summary.tokens, examples.iter().map(|e| e.tokens.len() as u64).sum::<u64>());
    let source = &summary.sources[0];
    assert_eq!((source.documents, source.exhausted), (60, true));
    assert_eq!(source.splits.iter().map(|s| s.examples).collect::<Vec<_>>(), [30, 8, 8]);
}

#[test]
fn a_seed_gives_the_same_examples_and_another_gives_others() {
    let setting = Setting::new(DATA, &format!("{SOURCE}[facts]\nmin = 0\nmax = 1\n"));
    setting.write("docs.txt", documents(80));
    let (a, _) = setting.run(1).unwrap();
    assert_eq!(setting.run(1).unwrap().0, a);
    assert_ne!(setting.run(2).unwrap().0, a);
}

#[test]
fn examples_are_drawn_from_all_of_a_source() {
    let setting = Setting::new(DATA, SOURCE);
    setting.write("docs.txt", documents(400));
    let (examples, summary) = setting.run(1).unwrap();
    let drawn: HashSet<_> = examples[..30].iter().map(|e| e.tokens[0] / 1000).collect();
    assert!(drawn.len() > 20, "30 training examples come from {} documents", drawn.len());
    // 60% of the documents train; 120 windows are enough to draw from.
    let split = &summary.sources[0].splits[0];
    assert!(split.possible >= 120, "{split:?}");
}

#[test]
fn duplicates_empty_and_short_documents_are_counted_and_skipped() {
    let setting = Setting::new(DATA, &SOURCE.replace("[\"docs.txt\"]", "[\"docs.txt\", \"more.txt\"]"));
    let all = documents(60);
    setting.write(
        "docs.txt",
        format!("{all}\0{}\0\0  \n\0{}\0{}", document(7, 47), document(99, 9), document(98, 1)),
    );
    setting.write("more.txt", document(8, 48));
    let (examples, summary) = setting.run(1).unwrap();
    let source = &summary.sources[0];
    assert_eq!((source.duplicates, source.empty, source.short, source.documents), (2, 2, 2, 64));
    assert!(examples.iter().all(|e| e.tokens[0] < 61_000));
    // Neither changes which examples there are.
    setting.write("docs.txt", all);
    setting.write("more.txt", document(9, 49));
    assert_eq!(setting.run(1).unwrap().0, examples);
}

#[test]
fn a_mixture_keeps_its_weights() {
    let other = SOURCE.replace("docs", "more").replace("format", "weight = 2\nformat");
    let setting = Setting::new(DATA, &format!("{SOURCE}{other}"));
    setting.write("docs.txt", documents(80));
    setting.write("more.txt", (101..=180).map(|d| document(d, 50)).collect::<Vec<_>>().join("\0"));
    let (examples, summary) = setting.run(1).unwrap();
    let count =
        |source: &str, split| examples.iter().filter(|e| e.source == source && e.split == split).count();
    assert_eq!((count("docs", Split::Train), count("more", Split::Train)), (10, 20));
    assert_eq!((count("docs", Split::Test), count("more", Split::Test)), (3, 5));
    assert_eq!(summary.sources[1].splits[0].examples, 20);
    // A document of both sources counts once, for the first.
    setting.write("more.txt", documents(80));
    assert!(
        setting.error().contains("source `more` gives 0 of 20 train examples (0 documents)"),
        "{}",
        setting.error()
    );
}

#[test]
fn a_kind_of_text_can_be_held_out() {
    let other = SOURCE.replace("docs", "more").replace("format", "splits = [\"test\"]\nformat");
    let docs = SOURCE.replace("format", "splits = [\"train\", \"validation\"]\nformat");
    let setting = Setting::new(DATA, &format!("{docs}{other}"));
    setting.write("docs.txt", documents(80));
    setting.write("more.txt", (101..=120).map(|d| document(d, 50)).collect::<Vec<_>>().join("\0"));
    let (examples, summary) = setting.run(1).unwrap();
    assert!(examples.iter().all(|e| (e.source == "more") == (e.split == Split::Test)));
    assert_eq!(examples.len(), 30 + 8 + 8);
    // Every document counts: none is lost because its hash points elsewhere.
    let documents = |source: usize, split: usize| summary.sources[source].splits[split].documents;
    assert_eq!(documents(1, 2), 20);
    assert_eq!(documents(0, 0) + documents(0, 1), 80);
    assert_eq!((documents(0, 2), documents(1, 0), documents(1, 1)), (0, 0, 0));
    // Those of the other splits are the same as without the key.
    let all = Setting::new(DATA, SOURCE);
    all.write("docs.txt", self::documents(80));
    let before = all.run(1).unwrap().1.sources[0].splits.each_ref().map(|s| s.documents);
    assert_eq!(documents(0, 1), before[1]);
}

#[test]
fn planted_facts_keep_the_length_and_are_where_they_say() {
    let data = DATA.replace("[20, 30]", "[200]").replace("min_tokens = 10", "min_tokens = 120");
    let mut setting = Setting::new(&data, &format!("{SOURCE}[facts]\nmin = 1\nmax = 9\n"));
    for place in [FactPlace::Anywhere, FactPlace::Sentence] {
        setting.place = place;
        check_planted(&setting);
    }
}

fn check_planted(setting: &Setting) {
    setting.write("docs.txt", (1..=80).map(|d| document(d, 500)).collect::<Vec<_>>().join("\0"));
    let (examples, summary) = setting.run(1).unwrap();
    let mut counts = HashSet::new();
    for e in &examples {
        counts.insert(e.facts.len());
        assert!(matches!(e.tokens.len(), 200 | 100 | 120..200), "{}", e.tokens.len());
        // One fact per 40 tokens at most.
        assert!((1..=5).contains(&e.facts.len()));
        let mut body = e.tokens.clone();
        for fact in e.facts.iter().rev() {
            let span = fact.start as usize..(fact.start + fact.len) as usize;
            assert_eq!(e.tokens[span.clone()], encode(&format!(" {}", fact.sentence)).unwrap());
            body.drain(span);
        }
        let first = e.tokens.iter().find(|t| **t < u32::MAX).unwrap() / 1000 * 1000 + e.start as u32;
        assert_eq!(body, (first..first + body.len() as u32).collect::<Vec<_>>());
    }
    assert_eq!(counts, HashSet::from([1, 2, 3, 4, 5]));
    assert_eq!(summary.facts, examples.iter().map(|e| e.facts.len() as u64).sum::<u64>());
}

#[test]
fn too_few_documents_say_how_many_there_were() {
    let setting = Setting::new(DATA, SOURCE);
    setting.write("docs.txt", documents(12));
    let error = setting.run(1).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("too few documents: source `docs` gives ")
            && text.contains(" of 30 train examples ("),
        "{text}"
    );
    assert!(text.contains("0 shorter than `data.min_tokens` = 10, 0 duplicates, 0 empty"), "{text}");
    let hint = error.downcast_ref::<pkv_core::Hinted>().unwrap().hint();
    assert!(
        hint.starts_with("add documents to `m.toml`, lower `data.") && hint.contains("`data.train`"),
        "{hint}"
    );
    // Enough for training, none for test.
    let setting = Setting::new(&DATA.replace("test_share = 0.2", "test_share = 0"), SOURCE);
    setting.write("docs.txt", documents(60));
    let error = setting.run(1).unwrap_err();
    assert!(error.to_string().contains("gives 0 of 8 test examples (0 documents)"), "{error}");
    assert!(error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains("raise `data.test_share`"));
    // Few: what the hint says is enough, and gives every split a document.
    for count in [3, 5, 9] {
        let setting = Setting::new(DATA, SOURCE);
        setting.write("docs.txt", documents(count));
        let error = setting.run(1).unwrap_err();
        let hint = error.downcast_ref::<pkv_core::Hinted>().unwrap().hint();
        let (_, sets) =
            hint.split_once("; or take what these documents give: `").unwrap_or_else(|| panic!("{hint}"));
        let said: Vec<String> = sets
            .trim_end_matches('`')
            .split("--set data.")
            .skip(1)
            .map(|set| set.trim().replace('=', " = "))
            .collect();
        let kept = DATA
            .lines()
            .filter(|line| !said.iter().any(|set| set.split(' ').next() == line.split(' ').next()));
        let fitted: String =
            kept.chain(said.iter().map(String::as_str)).flat_map(|line| [line, "\n"]).collect();
        let again = Setting::new(&fitted, SOURCE);
        again.write("docs.txt", documents(count));
        let (examples, _) = again.run(1).unwrap_or_else(|e| panic!("{count}: {fitted}\n{e:#}"));
        for split in Split::ALL {
            assert!(examples.iter().any(|e| e.split == split), "{count}: {fitted}");
        }
    }
    let setting = Setting::new(DATA, SOURCE);
    setting.write("docs.txt", documents(2));
    let error = setting.run(1).unwrap_err();
    assert!(
        error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains("there must be 3 or more"),
        "{error}"
    );
    let setting = Setting::new(&DATA.replace("test_share = 0.2", "test_share = 0"), SOURCE);
    // Documents of one token each.
    setting.write("docs.txt", (0..50).map(|d| d.to_string()).collect::<Vec<_>>().join("\0"));
    assert!(setting.error().contains("50 shorter than `data.min_tokens` = 10"), "{}", setting.error());
}

#[test]
fn bad_files_are_named() {
    let setting = Setting::new(DATA, SOURCE);
    assert!(
        setting.error().contains("cannot find the files of source `docs`: no file matches `docs.txt`"),
        "{}",
        setting.error()
    );
    setting.write("docs.txt", "\0 \n\0");
    assert!(setting.error().contains("docs.txt` holds no document, only empty text"), "{}", setting.error());
    setting.write("docs.txt", "");
    assert!(setting.error().contains("docs.txt` holds no document, only empty text"), "{}", setting.error());
    setting.write("docs.txt", b"good text\0\xc3\x28");
    assert!(setting.error().contains("docs.txt` is not UTF-8 text: byte 10"), "{}", setting.error());
    fs::remove_file(setting.dir.path().join("m.toml")).unwrap();
    assert!(setting.error().contains("cannot read data manifest"), "{}", setting.error());
}

#[test]
fn a_sink_that_fails_ends_the_stage() {
    let setting = Setting::new(DATA, SOURCE);
    setting.write("docs.txt", documents(60));
    let manifest = pkv_recipe::load_manifest(&setting.dir.path().join("m.toml")).unwrap();
    let hub = Hub::new(HubOptions::from_env());
    let reading = Reading { data: &setting.data, seed: Seed(1), encode: &encode, progress: &NoProgress };
    let mut calls = 0;
    let result = Preparation::new(&manifest, &hub, reading, planter(setting.place)).unwrap().run(&mut |_| {
        calls += 1;
        ensure!(calls < 3, "disk full");
        Ok(())
    });
    assert_eq!((result.unwrap_err().to_string().as_str(), calls), ("disk full", 3));
}

#[test]
fn apportioning_loses_nothing() {
    assert_eq!(apportion(10, &[1.0, 1.0, 1.0]), [4, 3, 3]);
    assert_eq!(apportion(7, &[0.5, 0.25, 0.25]), [3, 2, 2]);
    assert_eq!(apportion(1, &[0.1, 0.9]), [0, 1]);
    assert_eq!(apportion(0, &[1.0, 2.0]), [0, 0]);
    for total in 0..50 {
        assert_eq!(apportion(total, &[0.3, 1.7, 0.01, 5.0]).iter().sum::<usize>(), total);
    }
}
