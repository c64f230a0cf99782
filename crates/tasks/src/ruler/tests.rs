//! The tasks against the reference's parameters, and what their examples are like.

use std::collections::HashSet;

use super::niah::{Haystack, NOISE, Parameters, Token};
use super::*;

/// A tokenizer of sorts: words, and every other character that is no space.
fn count(text: &str) -> Result<usize> {
    let mut n = 0;
    let mut in_word = false;
    for c in text.chars() {
        let word = c.is_alphanumeric();
        n += usize::from(if word { !in_word } else { !c.is_whitespace() });
        in_word = word;
    }
    Ok(n)
}

fn sources() -> Sources {
    // Sentences that can be distinguished: sentence 17 says so.
    let essay =
        (0..4000).map(|i| format!("Sentence {i} of the essay, which says little. ")).collect::<String>();
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let document = |i: usize| {
        format!(
            "Title {i}\nDocument {i} says that item {i} is worth {} coins. {}",
            7 * i,
            "More. ".repeat(20)
        )
    };
    let question = |i: usize, related: Vec<usize>| Question {
        question: format!("What is item {i} worth?"),
        answers: vec![format!("{} coins", 7 * i), format!("worth {}", 7 * i)],
        documents: vec![i],
        related,
    };
    let set = |related: bool| QaSet {
        documents: (0..300).map(document).collect(),
        questions: (0..60).map(|i| question(i, if related { vec![i + 1, i + 2] } else { vec![] })).collect(),
    };
    Sources {
        essay: Some(words(&essay).into()),
        squad: Some(set(true).into()),
        hotpotqa: Some(set(false).into()),
        extra_words: None,
    }
}

fn with<T>(task: RulerTask, tokens: usize, what: impl FnOnce(&Generator) -> T) -> T {
    let sources = sources();
    let generator = Generator::new(task, tokens, 12, &sources, &count, Seed(5)).unwrap();
    what(&generator)
}

fn prompt(e: &Example) -> String {
    format!("{}{}{}", e.context, e.turns[0].question, e.turns[0].answer_prefix)
}

#[test]
fn parameters_are_the_references() {
    use Haystack::{Essay, Needle, Noise};
    use Token::{Numbers, Uuids, Words};
    // scripts/synthetic.yaml: type_haystack, type_needle_k, type_needle_v, num_needle_k, num_needle_v,
    // num_needle_q; niah.py raises num_needle_k to num_needle_q.
    let niah = [
        (RulerTask::NiahSingle1, Noise, Words, Numbers, 1, 1, 1),
        (RulerTask::NiahSingle2, Essay, Words, Numbers, 1, 1, 1),
        (RulerTask::NiahSingle3, Essay, Words, Uuids, 1, 1, 1),
        (RulerTask::NiahMultikey1, Essay, Words, Numbers, 4, 1, 1),
        (RulerTask::NiahMultikey2, Needle, Words, Numbers, 1, 1, 1),
        (RulerTask::NiahMultikey3, Needle, Uuids, Uuids, 1, 1, 1),
        (RulerTask::NiahMultivalue, Essay, Words, Numbers, 1, 4, 1),
        (RulerTask::NiahMultiquery, Essay, Words, Numbers, 4, 1, 4),
    ];
    for (task, haystack, key, value, keys, values, queries) in niah {
        assert_eq!(
            Parameters::of(task),
            Some(Parameters { haystack, key, value, keys, values, queries }),
            "{task:?}"
        );
    }
    // scripts/data/synthetic/constants.py: tokens_to_generate; scripts/eval/synthetic/constants.py:
    // metric_fn.
    let rest = [
        (RulerTask::NiahSingle1, 128, Metric::StringMatchAll),
        (RulerTask::Vt, 30, Metric::StringMatchAll),
        (RulerTask::Cwe, 120, Metric::StringMatchAll),
        (RulerTask::Fwe, 50, Metric::StringMatchAll),
        (RulerTask::Qa1, 32, Metric::StringMatchPart),
        (RulerTask::Qa2, 32, Metric::StringMatchPart),
    ];
    for (task, tokens, metric) in rest {
        assert_eq!((task.max_new_tokens(), task.metric()), (tokens, metric), "{task:?}");
    }
    for task in RulerTask::ALL {
        assert_eq!(RulerTask::named(task.name()), Some(task));
    }
}

#[test]
fn a_copied_answer_scores_100_and_an_empty_one_0() {
    for task in RulerTask::ALL {
        with(task, 4096, |g| {
            for index in 0..10 {
                let e = g.example(index).unwrap();
                let turn = &e.turns[0];
                assert_eq!(turn.score(&format!(" {}.\n", turn.wanted.join(", "))), 1.0, "{}", e.id);
                assert_eq!(turn.score(""), 0.0, "{}", e.id);
                let share =
                    if turn.metric == Metric::StringMatchPart { 1.0 } else { 1.0 / turn.wanted.len() as f64 };
                assert!((turn.score(&turn.wanted[0]) - share).abs() < 1e-9, "{}", e.id);
                // The context holds what is asked for.
                assert!(turn.wanted.iter().all(|w| e.context.contains(w.as_str())), "{}", e.id);
            }
        });
    }
}

#[test]
fn lengths_lie_just_below_the_wanted_one() {
    for tokens in [1000, 1400, 4096, 20_000] {
        for task in RulerTask::ALL {
            let total = with(task, tokens, |g| {
                let lengths = (0..20).map(|i| {
                    let e = g.example(i).unwrap();
                    count(&prompt(&e)).unwrap() + 12 + task.max_new_tokens()
                });
                lengths.collect::<Vec<_>>()
            });
            let (least, most) = (*total.iter().min().unwrap(), *total.iter().max().unwrap());
            assert!(most <= tokens, "{} at {tokens}: {most}", task.name());
            // Measured: 97.8% at the least, `niah_single_1` at 1,000 tokens, where a piece of noise is the
            // step.
            assert!(100 * least >= 97 * tokens, "{} at {tokens}: {least} to {most}", task.name());
        }
    }
}

#[test]
fn needles_lie_anywhere() {
    // Depth in the context of 400 needles, in tenths.
    for task in
        [RulerTask::NiahSingle1, RulerTask::NiahSingle2, RulerTask::NiahMultikey1, RulerTask::NiahMultikey2]
    {
        let mut tenths = [0i32; 10];
        with(task, 2000, |g| {
            for i in 0..400 {
                let e = g.example(i).unwrap();
                let at = e.context.find(&e.turns[0].wanted[0]).unwrap();
                tenths[(10 * at / e.context.len()).min(9)] += 1;
            }
        });
        // Chi-square of ten equally likely tenths: above 27.9 once in a thousand times.
        let chi_square: f64 = tenths.iter().map(|&n| (f64::from(n) - 40.0).powi(2) / 40.0).sum();
        assert!(chi_square < 27.9, "{task:?}: {chi_square} {tenths:?}");
    }
}

#[test]
fn needles_in_essays_are_between_whole_sentences() {
    // niah.py: needle i before sentence int(n * depth / 100) of n, depths drawn from 40 without repetition;
    // essays are cut after a number of words, so that the last piece alone may be no whole sentence.
    for task in [
        RulerTask::NiahSingle2,
        RulerTask::NiahSingle3,
        RulerTask::NiahMultikey1,
        RulerTask::NiahMultivalue,
        RulerTask::NiahMultiquery,
    ] {
        with(task, 2000, |g| {
            let mut inside = 0;
            for i in 0..100 {
                let e = g.example(i).unwrap();
                let prose = e.context.split_once('\n').unwrap().1;
                let pieces: Vec<&str> = prose.split("One of the special magic ").collect();
                for (k, piece) in pieces.iter().enumerate().take(pieces.len() - 1) {
                    // What is before the next needle, the needle before it taken off.
                    let before = if k == 0 { piece } else { piece.split_once(".").unwrap().1 };
                    let last = k + 2 == pieces.len() && pieces[k + 1].trim_end().matches(' ').count() <= 4;
                    assert!(
                        before.trim().is_empty() || before.ends_with(". ") || last,
                        "{}: {before:?}",
                        e.id
                    );
                    inside += usize::from(before.ends_with("says little. "));
                }
            }
            assert!(inside > 80, "{task:?}: {inside}");
        });
    }
    // Needles among noise and among needles are lines of their own.
    for task in [RulerTask::NiahSingle1, RulerTask::NiahMultikey2, RulerTask::NiahMultikey3] {
        with(task, 2000, |g| {
            for i in 0..50 {
                let e = g.example(i).unwrap();
                let (_, hay) = e.context.split_once('\n').unwrap();
                let is_needle = |l: &str| l.starts_with("One of the special magic ") && l.ends_with('.');
                assert!(hay.lines().all(|l| l == NOISE || is_needle(l)), "{}", e.id);
            }
        });
    }
}

#[test]
fn a_context_that_comes_out_short_says_so() {
    for task in RulerTask::ALL {
        let got = with(task, 4096, |g: &Generator| g.tokens());
        assert!((3970..=4096).contains(&got), "{}: {got}", task.name());
    }
    // There are 8,166 words: their list is shorter than half a million tokens.
    let got = with(RulerTask::Cwe, 500_000, |g: &Generator| g.tokens());
    assert!((50_000..450_000).contains(&got), "{got}");
}

#[test]
fn prompts_read_as_the_references() {
    let e = with(RulerTask::NiahSingle1, 1000, |g| g.example(3).unwrap());
    let (key, value) = (key_of(&e), &e.turns[0].wanted[0]);
    assert!(e.context.starts_with(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the \
         number afterwards.\nThe grass is green."
    ));
    assert!(
        e.context.contains(&format!("\nOne of the special magic numbers for {key} is: {value}.\n{NOISE}"))
    );
    assert_eq!(
        e.turns[0].question,
        format!("\nWhat is the special magic number for {key} mentioned in the provided text?")
    );
    assert_eq!(
        e.turns[0].answer_prefix,
        format!(" The special magic number for {key} mentioned in the provided text is")
    );

    let e = with(RulerTask::NiahMultiquery, 4096, |g| g.example(0).unwrap());
    assert!(e.context.starts_with("Some special magic numbers are hidden"));
    assert!(e.turns[0].question.starts_with("\nWhat are all the special magic numbers for "));
    assert_eq!(e.turns[0].wanted.len(), 4);
    assert!(e.turns[0].question.contains(", and "));
    // A needle is between whole sentences.
    let at = e.context.find("One of the special").unwrap();
    assert!(e.context[..at].ends_with(". "), "{}", &e.context[at - 20..at + 10]);
    let e = with(RulerTask::NiahMultivalue, 4096, |g| g.example(0).unwrap());
    assert_eq!(e.turns[0].wanted.len(), 4);
    assert_eq!(e.context.matches(&format!("numbers for {} is: ", key_of(&e))).count(), 4);

    let e = with(RulerTask::Vt, 1400, |g| g.example(0).unwrap());
    let introduction =
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";
    assert_eq!(e.context.matches(introduction).count(), 2, "a solved example stands first");
    let own = e.context.rsplit(introduction).next().unwrap();
    let chain: Vec<&str> = own.lines().filter_map(|l| l.strip_prefix("VAR ")).collect();
    let v = &e.turns[0].wanted;
    assert_eq!(v.len(), 5);
    assert!(v.iter().all(|v| v.len() == 5) && v.iter().collect::<HashSet<_>>().len() == 5);
    let value = chain[0].strip_prefix(&format!("{} = ", v[0])).unwrap();
    assert_eq!(chain[1..], [1, 2, 3, 4].map(|i| format!("{} = VAR {} ", v[i], v[i - 1])));
    assert!(
        e.turns[0]
            .answer_prefix
            .ends_with(&format!("5 variables are assigned the value {value}, they are: "))
    );
    // The example's variables differ from prompt to prompt, and its answer lists them.
    let other = with(RulerTask::Vt, 1400, |g| g.example(1).unwrap());
    assert_ne!(other.context.split(introduction).nth(1), e.context.split(introduction).nth(1));
    let solved = e.context.split(introduction).nth(1).unwrap();
    let answer: Vec<&str> = solved.rsplit("they are: ").next().unwrap().split_whitespace().collect();
    assert_eq!(answer.len(), 5);
    assert!(answer.iter().all(|v| v.len() == 3 && solved.contains(&format!("VAR {v} = "))), "{answer:?}");

    let e = with(RulerTask::Qa1, 4096, |g| g.example(4).unwrap());
    assert!(e.context.contains("\n\nThe following are given documents.\n\nDocument 1:\nTitle "));
    assert!(e.turns[0].question.ends_with("\n\nQuestion: What is item 4 worth?"));
    assert_eq!(e.turns[0].answer_prefix, " Answer:");
    // Paragraphs of the same article come before others.
    assert!([4, 5, 6].iter().all(|i| e.context.contains(&format!("Title {i}\n"))));
}

fn key_of(e: &Example) -> String {
    let q = &e.turns[0].question;
    let start = q.find(" for ").unwrap() + 5;
    q[start..q.find(" mentioned").unwrap()].to_owned()
}

#[test]
fn words_are_as_frequent_as_the_reference_has_them() {
    // Below 4,096 tokens: 6 times and once, with a solved list of 20 words (3 and 1); else 30 and 3, 40 words
    // (10 and 3).
    for (tokens, common, other, solved) in [(1400, 6, 1, 10 * 3 + 10), (4096, 30, 3, 10 * 10 + 30 * 3)] {
        let e = with(RulerTask::Cwe, tokens, |g| g.example(0).unwrap());
        let lists: Vec<&str> =
            e.context.split("Memorize the ones that appear most often.\n").skip(1).collect();
        let words = |list: &str| {
            let list = list.split("\nQuestion").next().unwrap().to_owned();
            let mut words = std::collections::HashMap::new();
            let numbered: Vec<&str> = list.split(". ").collect();
            for piece in &numbered[1..] {
                let word = piece
                    .rsplit_once(' ')
                    .map_or(*piece, |(w, n)| if n.parse::<u32>().is_ok() { w } else { piece });
                *words.entry(word.to_owned()).or_insert(0) += 1;
            }
            words
        };
        assert_eq!(lists.len(), 2);
        assert_eq!(words(lists[0]).values().sum::<i32>(), solved);
        let counts = words(lists[1]);
        assert_eq!(e.turns[0].wanted.len(), 10);
        for (word, n) in &counts {
            let wanted = if e.turns[0].wanted.contains(word) { common } else { other };
            assert_eq!(*n, wanted, "{word}");
        }
    }
    let e = with(RulerTask::Fwe, 4096, |g| g.example(0).unwrap());
    let text = e.context.split("coded words. ").nth(1).unwrap();
    let mut counts = std::collections::HashMap::new();
    text.split(' ').for_each(|w| *counts.entry(w).or_insert(0usize) += 1);
    let mut ranked: Vec<_> = counts.values().copied().collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    // Zeta with exponent 2: the second word a quarter as frequent as the first, the third a ninth.
    assert_eq!(counts["..."], ranked[0]);
    let asked: Vec<usize> = e.turns[0].wanted.iter().map(|w| counts[w.as_str()]).collect();
    assert_eq!(asked, ranked[1..4]);
    for (rank, n) in [(2.0f64, asked[0]), (3.0, asked[1]), (4.0, asked[2])] {
        let expected = ranked[0] as f64 / (rank * rank);
        assert!((n as f64 - expected).abs() <= 1.5, "rank {rank}: {n}, expected {expected}");
    }
}

#[test]
fn examples_do_not_depend_on_each_other() {
    let of = |seed, index| {
        let sources = sources();
        let g = Generator::new(RulerTask::NiahMultikey2, 1400, 0, &sources, &count, Seed(seed)).unwrap();
        g.example(index).unwrap()
    };
    assert_eq!(of(1, 7), of(1, 7));
    assert_ne!(of(1, 7), of(1, 8));
    assert_ne!(of(1, 7).context, of(2, 7).context);
}

#[test]
fn what_is_missing_is_named() {
    let empty = Sources::default();
    let error = |task, tokens, sources: &Sources| {
        let e = Generator::new(task, tokens, 0, sources, &count, Seed(1)).map(|_| ()).unwrap_err();
        format!("{e:#}")
    };
    assert!(error(RulerTask::NiahSingle2, 4096, &empty).contains("there are none"));
    assert!(error(RulerTask::Qa2, 4096, &empty).contains("`qa_2` needs a file of questions"));
    assert!(error(RulerTask::NiahSingle1, 150, &empty).contains("does not fit 150 tokens"));
    assert!(error(RulerTask::NiahSingle1, 100, &empty).contains("does not fit 100 tokens"));
    assert!(error(RulerTask::Fwe, 200, &empty).contains("150 tokens are too few"));
    let sources = sources();
    let g = Generator::new(RulerTask::Qa1, 4096, 0, &sources, &count, Seed(1)).unwrap();
    assert!(g.example(60).unwrap_err().to_string().contains("holds 60 questions"));
}

#[test]
fn questions_are_read_from_either_form() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let original = write(
        "squad.json",
        r#"{"version": "v2.0", "data": [{"title": "T", "paragraphs": [
            {"context": "p1", "qas": [{"question": "q1", "is_impossible": false, "answers": [{"text": "a", "answer_start": 0}]},
                                      {"question": "q2", "is_impossible": true, "answers": []}]},
            {"context": "p0", "qas": [{"question": "q3", "is_impossible": false, "answers": [{"text": "b", "answer_start": 0}, {"text": "c", "answer_start": 0}]}]}]}]}"#,
    );
    let rows = write(
        "squad.jsonl",
        r#"{"title": "T", "context": "p1", "question": "q1", "answers": {"text": ["a"], "answer_start": [0]}}
{"title": "T", "context": "p1", "question": "q2", "answers": {"text": [], "answer_start": []}}
{"title": "T", "context": "p0", "question": "q3", "answers": {"text": ["b", "c"], "answer_start": [0, 0]}}
"#,
    );
    let squad = QaSet::squad(&original).unwrap();
    assert_eq!(squad, QaSet::squad(&rows).unwrap());
    assert_eq!(squad.documents, ["p0", "p1"]);
    assert_eq!(squad.questions.len(), 2);
    assert_eq!(
        (squad.questions[0].documents.clone(), squad.questions[0].related.clone()),
        (vec![1], vec![0])
    );
    assert_eq!(squad.questions[1].answers, ["b", "c"]);

    let original = write(
        "hotpot.json",
        r#"[{"question": "q", "answer": "a", "context": [["T", ["one.", " two."]], ["S", ["x"]]]}]"#,
    );
    let rows = write(
        "hotpot.jsonl",
        r#"{"question": "q", "answer": "a", "context": {"title": ["T", "S"], "sentences": [["one.", " two."], ["x"]]}}"#,
    );
    let set = QaSet::hotpotqa(&original).unwrap();
    assert_eq!(set, QaSet::hotpotqa(&rows).unwrap());
    assert_eq!(set.documents, ["S\nx", "T\none. two."]);
    assert_eq!(set.questions[0].documents, [1, 0]);
    let error = format!("{:#}", QaSet::hotpotqa(&write("bad.json", "{}")).unwrap_err());
    assert!(error.contains("is no file of HotpotQA"), "{error}");
}

#[test]
fn files_of_questions_that_do_not_fit_are_named_by_row_and_column() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let row = r#"{"title": "T", "context": "p", "question": "q", "answers": {"text": ["a"]}}"#;
    for (from, to, expected) in [
        (r#""question": "q""#, r#""question": """#, "row 2: column `question` is empty"),
        (r#""context": "p""#, r#""context": 3"#, "row 2: column `context` holds a number, expected text"),
        (r#""title": "T", "#, "", "row 2: column `title` is absent"),
        (r#"{"text": ["a"]}"#, "null", "row 2: column `answers` is absent"),
        (r#"{"text": ["a"]}"#, r#""a""#, "row 2: column `answers`: column `text` is absent"),
        (r#"["a"]"#, r#"[""]"#, "column `text[0]` holds empty text"),
        (r#"["a"]"#, r#""a""#, "column `text` holds text, expected a list"),
    ] {
        let file = path("squad.jsonl", &format!("{row}\n{}\n", row.replace(from, to)));
        let error = QaSet::squad(&file).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("squad.jsonl") && text.contains(expected), "expected {expected}, found {text}");
        assert!(error.is::<pkv_core::Hinted>());
    }
    for (qas, expected) in [
        (
            r#"[{"question": "q", "answers": [{"text": ""}]}]"#,
            "`data[0].paragraphs[0].qas[0]`: column `text` is empty",
        ),
        (r#"{"question": "q"}"#, "`data[0].paragraphs[0]`: column `qas` holds an object, expected a list"),
    ] {
        let text = format!(r#"{{"data": [{{"paragraphs": [{{"context": "p", "qas": {qas}}}]}}]}}"#);
        let text = format!("{:#}", QaSet::squad(&path("dev.json", &text)).unwrap_err());
        assert!(text.contains(expected), "expected {expected}, found {text}");
    }
    let row = r#"{"question": "q", "answer": "a", "context": [["T", ["one."]]]}"#;
    for (from, to, expected) in [
        (r#""answer": "a""#, r#""answer": """#, "row 2: column `answer` is empty"),
        (r#"[["T", ["one."]]]"#, "[]", "row 2: column `context` is an empty list"),
        (r#"[["T", ["one."]]]"#, "3", "row 2: column `context`"),
        (r#"["one."]"#, r#""one.""#, "row 2: column `context`: document 1 is not a title"),
        (r#"["one."]"#, "[]", "row 2: column `context`: document 1 is not a title"),
        (r#""question": "q", "#, "", "row 2: column `question` is absent"),
    ] {
        let file = path("hotpot.json", &format!("[{row},\n{}]\n", row.replace(from, to)));
        let text = format!("{:#}", QaSet::hotpotqa(&file).unwrap_err());
        assert!(text.contains("hotpot.json") && text.contains(expected), "expected {expected}, found {text}");
    }
    for (name, text) in [("e.json", "{\"words\": 3}"), ("e.txt", " \n"), ("e.json", "[1]")] {
        assert!(Sources::read_essay(&path(name, text)).unwrap_err().to_string().contains("holds no words"));
    }
    assert!(
        Sources::read_words(&path("w.json", "{\"1\": 3}"))
            .unwrap_err()
            .to_string()
            .contains("holds no words")
    );
}
