//! Metrics against recorded outputs of the references' own code.

use super::*;
use serde_json::Value;

const GOLDENS: &str = include_str!("../../tests/goldens/metrics.json");

#[test]
fn every_metric_scores_as_its_reference() {
    let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
    let cases = goldens["cases"].as_array().unwrap();
    assert!(cases.len() > 500, "{}", cases.len());
    let texts =
        |v: &Value| v.as_array().unwrap().iter().map(|t| t.as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let mut wrong = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for case in cases {
        let metric: Metric = serde_json::from_value(case["metric"].clone()).unwrap();
        seen.insert(metric);
        let score =
            metric.score(case["answer"].as_str().unwrap(), &texts(&case["wanted"]), &texts(&case["others"]));
        // The references round two of RULER's metrics to hundredths of a percent.
        let tolerance = if metric == Metric::StringMatchAll { 5.1e-5 } else { 1e-9 };
        if (score - case["score"].as_f64().unwrap()).abs() > tolerance {
            wrong.push(format!("{score} for {case}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    // `Function` is made of the similarity below.
    assert_eq!(seen.len(), 19, "a metric has no case");
}

#[test]
fn similarities_of_functions_are_nltks() {
    let goldens: Value = serde_json::from_str(GOLDENS).unwrap();
    for case in goldens["similarities"].as_array().unwrap() {
        let score = bleu::bleu(case["answer"].as_str().unwrap(), case["wanted"].as_str().unwrap());
        assert!((score - case["bleu"].as_f64().unwrap()).abs() < 1e-12, "{score} for {case}");
    }
}
