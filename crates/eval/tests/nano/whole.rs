//! Every method and both tasks.

use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use pkv_core::{Fingerprint, NoProgress, Policy};
use pkv_eval::{EvalInputs, evaluate, methods};
use pkv_recipe::{EvalSection, MethodName, TaskName};
use pkv_results::{AGREEMENT_FILE, ANSWERS_FILE, CONTEXTS_FOLDER, RESULTS_FILE, Results, table};

use crate::fixture::Nano;

#[test]
fn the_oracle_answers_where_chance_does_not_and_a_whole_cache_changes_nothing() {
    let mut nano = Nano::new(6);
    nano.section.methods = methods::names().collect();
    let out = nano.stage("eval");
    let stages = nano.stages();
    let inputs = nano.inputs(&stages, &nano.contexts, &out);
    let is_complete =
        |inputs: &EvalInputs| crate::union::asked(inputs).is_complete(&out, &inputs.fingerprint).unwrap();
    assert!(!is_complete(&inputs));
    let results = evaluate(&inputs, &NoProgress).unwrap();

    // What is on disk is what was returned, and nothing else stays.
    assert!(is_complete(&inputs));
    let other = EvalInputs { base: Fingerprint::new(), ..nano.inputs(&stages, &nano.contexts, &out) };
    assert!(!is_complete(&other));
    assert!(Results::read(&out.join(RESULTS_FILE)).unwrap() == results, "read back, the results differ");
    let mut files: Vec<_> =
        std::fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, [AGREEMENT_FILE, ANSWERS_FILE, CONTEXTS_FOLDER, RESULTS_FILE, "scorers"]);

    let facts = results.facts.as_ref().unwrap();
    assert_eq!((facts.contexts, facts.questions), (6, 18));
    assert!(facts.full.mean > 0.9, "the full cache answers {:?}", facts.full);
    for cell in &facts.cells {
        let (exact, f1) = (cell.exact_match.unwrap().mean, cell.f1.unwrap().mean);
        assert!(cell.score.mean <= exact + 1e-9 && exact <= f1 + 1e-9, "{cell:?}");
    }
    let answers = |method, ratio| facts.cell(method, Policy::Pair, ratio).unwrap();
    let (oracle, chance) = (answers(MethodName::KVZIP, 0.2), answers(MethodName::RANDOM, 0.2));
    assert!(oracle.score.mean > chance.score.mean + 0.3, "{oracle:?} {chance:?}");
    assert!(oracle.kl.mean < 0.5 * chance.kl.mean && oracle.flips.mean < chance.flips.mean);
    assert_eq!(oracle.of_kvzip.unwrap().mean, 1.0);
    let recovered = chance.score.mean / oracle.score.mean;
    assert!((chance.of_kvzip.unwrap().mean - recovered).abs() < 1e-12);
    for method in methods::names() {
        let whole = answers(method, 1.0);
        assert_eq!(whole.score, facts.full, "{method:?}");
        assert!(whole.kl.mean < 1e-6 && whole.flips.mean == 0.0, "{method:?}: {whole:?}");
    }

    let perplexity = results.perplexity.as_ref().unwrap();
    assert_eq!((perplexity.contexts, perplexity.continuation_tokens), (4, 31));
    for method in methods::names() {
        let excess = perplexity.cell(method, Policy::Pair, 1.0).unwrap().excess.mean;
        assert!(excess.abs() < 1e-5, "{method:?}: {excess}");
    }
    let excess = |method| perplexity.cell(method, Policy::Pair, 0.05).unwrap().excess.mean;
    assert!(excess(MethodName::of("streaming-llm")) < excess(MethodName::RANDOM));

    labels_make_sense(&results);

    let example = results.worked_example.as_ref().unwrap();
    assert_eq!((example.tokens.len(), example.facts.len(), example.pairs_per_position), (300, 3, 12));
    for kept in &example.kept {
        let total: u32 = kept.counts.iter().sum();
        assert_eq!(total, (12.0 * 300.0 * kept.ratio).round() as u32, "{:?}", kept.method);
    }
    let fact = &example.facts[0];
    let sentence = example.tokens[fact.start..fact.start + fact.len].concat();
    assert!(sentence.contains(&fact.answer), "{sentence:?} holds no {:?}", fact.answer);

    let file = std::fs::File::open(out.join(ANSWERS_FILE)).unwrap();
    let rows = SerializedFileReader::new(file).unwrap().metadata().file_metadata().num_rows();
    let methods = methods::names().count();
    assert_eq!(rows, 18 * (1 + methods as i64 * 3));

    let text = table::all_tables(&results);
    for part in [
        "### Questions answered",
        "| full cache",
        "| streaming-llm",
        "`proxy-linear`: ridge",
        "`kvzap-mlp`: from the target's",
        "5%",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    fitted_scorers_are_used_again(&nano, &stages, &out, &results);
}

/// Another evaluation into the folder, with a task less, finds KVzap's scorers and says the same.
fn fitted_scorers_are_used_again(nano: &Nano, stages: &[PathBuf; 3], out: &Path, first: &Results) {
    let written = || {
        let files = std::fs::read_dir(out.join("scorers")).unwrap().map(|f| f.unwrap());
        let files = files.filter(|f| f.path().extension().is_some_and(|e| e == "safetensors"));
        files.map(|f| (f.file_name(), f.metadata().unwrap().modified().unwrap())).collect::<Vec<_>>()
    };
    let before = written();
    assert_eq!(before.len(), 2, "one of each scorer: {before:?}");
    let section = EvalSection { tasks: vec![TaskName::FACTS], ..nano.section.clone() };
    let mut inputs = nano.inputs(stages, &nano.contexts, out);
    (inputs.section, inputs.fingerprint) = (&section, inputs.fingerprint.with("tasks", "facts"));
    let again = evaluate(&inputs, &NoProgress).unwrap();
    assert_eq!(written(), before);
    assert!(again.facts == first.facts && again.notes == first.notes);
}

fn labels_make_sense(results: &Results) {
    let labels = &results.labels;
    assert_eq!((labels.contexts, labels.positions), (4, 4 * 260));
    assert_eq!(labels.cells.len(), methods::names().count() * Policy::WITHOUT_KEYS.len() * 2);
    for policy in Policy::WITHOUT_KEYS {
        for ratio in [0.2, 0.05] {
            let cell = |method| labels.cell(method, policy, ratio).unwrap();
            assert_eq!((cell(MethodName::KVZIP).recall.mean, cell(MethodName::KVZIP).mass.mean), (1.0, 1.0));
            for c in labels.cells.iter().filter(|c| c.policy == policy && c.ratio == ratio) {
                assert!((c.realised - ratio).abs() < 1e-9, "{c:?}");
                assert!(c.recall.mean <= 1.0, "{c:?}");
                // Nothing else keeps as much mass, where it is mass that is ranked.
                let by_mass = !matches!(policy, Policy::Token | Policy::PairFloor);
                assert!(!by_mass || c.mass.mean <= 1.0 + 1e-6, "{c:?}");
            }
            let chance = cell(MethodName::RANDOM).recall.mean;
            // Budgets know which heads are kept, wherever in them: at random that is already much.
            let (floor, lead) = match policy {
                Policy::PairBudget => {
                    assert!(chance > ratio + 0.1, "{ratio}: {chance}");
                    (0.0, 0.05)
                }
                _ => {
                    assert!((chance - ratio).abs() < 0.06, "{policy:?} {ratio}: {chance}");
                    (0.05, 0.2)
                }
            };
            // The mapper of this test is the same ridge solution that the baseline is fitted to be.
            let (mapper, linear) =
                (cell(MethodName::MAPPER).recall.mean, cell(MethodName::LINEAR).recall.mean);
            assert!((mapper - linear).abs() < 0.01, "{policy:?} {ratio}: {mapper}, {linear}");
            assert!(mapper > chance + lead, "{policy:?} {ratio}: {mapper}, chance {chance}");
            assert!(cell(MethodName::of("kvzip-pooled")).recall.mean > 0.6);
            for method in [MethodName::of("kvzap-linear"), MethodName::of("kvzap-mlp")] {
                // Few training contexts: far above chance where heads compete, above it everywhere.
                let (learnt, more) =
                    (cell(method).recall.mean, if policy == Policy::Pair { 0.2 } else { floor });
                assert!(learnt > chance + more, "{method:?} {policy:?} {ratio}: {learnt}, chance {chance}");
            }
        }
        // Positions at random in the strongest heads: only the heads are known.
        let prior = labels.cell(MethodName::HEAD_PRIOR, Policy::Pair, 0.2).unwrap().recall.mean;
        assert!(prior > 0.3, "{prior}");
    }
    // What each policy holds of the best set: a floor and fixed budgets by head hold more than equal ones,
    // and those more than whole positions. Under `pair` it is the recall.
    for ratio in [0.2, 0.05] {
        let held = |method, policy| labels.cell(method, policy, ratio).unwrap().recall_of_pair.unwrap().mean;
        for method in [MethodName::KVZIP, MethodName::MAPPER] {
            let all @ [pair, floor, uniform, budget, token] =
                Policy::WITHOUT_KEYS.map(|policy| held(method, policy));
            assert!(floor > uniform && budget > uniform && uniform > token, "{method} at {ratio}: {all:?}");
            // Of n pairs under the floor, 5/6 n or more are among the best n of all.
            let of_kvzip = pair == 1.0 && floor > 0.83 && budget > 0.9;
            assert!(method != MethodName::KVZIP || of_kvzip, "{ratio}: {all:?}");
            assert_eq!(pair, labels.cell(method, Policy::Pair, ratio).unwrap().recall.mean);
        }
    }
    let table = table::policy_table(results).unwrap();
    assert!(table.contains("| kvzip, pair-budget ") && table.contains("| mapper, pair-uniform "), "{table}");
    let heads = labels.heads.as_ref().unwrap();
    assert_eq!((heads.kvzip_kept.len(), heads.kvzip_kept[0].len(), heads.ratio), (6, 2, 0.05));
    let kept: f64 = heads.kvzip_kept.concat().iter().sum();
    assert!((kept / 12.0 - 0.05).abs() < 1e-3, "{kept}");
    let rank = |method| labels.ranks.iter().find(|r| r.method == method).unwrap();
    assert!((rank(MethodName::KVZIP).spearman - 1.0).abs() < 1e-9);
    assert!(rank(MethodName::RANDOM).kendall.abs() < 0.1);
    assert!(rank(MethodName::MAPPER).spearman > 0.2);
}
