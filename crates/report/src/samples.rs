//! Single questions about planted facts: right and wrong answers, and where the wrong ones are.

use std::collections::BTreeMap;

use pkv_core::Policy;
use pkv_recipe::MethodName;
use pkv_results::FactAnswer;
use serde::Serialize;

use crate::chart::percent_text;
use crate::figures::percent;
use crate::method::Methods;
use crate::tables::{Cell, Row, Table, points};

/// Questions shown of each kind of outcome.
const SHOWN: usize = 8;
/// Parts of a context, by where the fact is.
const DEPTHS: [&str; 4] = ["first quarter", "second quarter", "third quarter", "last quarter"];

/// Data of the template.
#[derive(Serialize)]
pub struct Samples {
    pub reading: String,
    pub note: String,
    /// By kind of fact, by depth, by length.
    pub tables: Vec<Table>,
    pub rows: Vec<SampleRow>,
}

#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct SampleRow {
    pub question: String,
    pub kind: String,
    pub wanted: String,
    /// Of the full cache, of KVzip's, of the mapper's.
    pub answers: Vec<Answer>,
    /// Of the fact's KV pairs, the share that the mapper keeps.
    pub kept: String,
    pub depth: String,
}

/// One answer to a question.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Answer {
    pub text: String,
    pub is_right: bool,
}

/// The answers to one question at one ratio.
struct Answers<'a> {
    full: &'a FactAnswer,
    kvzip: Option<&'a FactAnswer>,
    mapper: &'a FactAnswer,
}

/// `None` if the mapper was not asked at `ratio` under `policy`.
pub fn samples(methods: Methods, all: &[FactAnswer], policy: Policy, ratio: f64) -> Option<Samples> {
    let at = |s: &&FactAnswer| s.cell.is_none_or(|c| (c.1, c.2) == (policy, ratio));
    let mut by_question: BTreeMap<(u32, u32), Vec<&FactAnswer>> = BTreeMap::new();
    for sample in all.iter().filter(at) {
        by_question.entry(sample.place).or_default().push(sample);
    }
    let of =
        |given: &[&'_ FactAnswer], m: Option<MethodName>| given.iter().position(|s| s.cell.map(|c| c.0) == m);
    let asked: Vec<Answers> = by_question
        .values()
        .filter_map(|given| {
            Some(Answers {
                full: given[of(given, None)?],
                kvzip: of(given, Some(MethodName::KVZIP)).map(|i| given[i]),
                mapper: given[of(given, Some(MethodName::MAPPER))?],
            })
        })
        .collect();
    if asked.is_empty() {
        return None;
    }
    let (right, wrong): (Vec<&Answers>, Vec<&Answers>) = asked.iter().partition(|a| a.mapper.is_right);
    let lost = wrong.iter().filter(|a| a.full.is_right).count();
    let mean = |of: &[&Answers]| {
        let kept: Vec<f64> = of.iter().filter_map(|a| a.mapper.kept).collect();
        (!kept.is_empty()).then(|| kept.iter().sum::<f64>() / kept.len() as f64)
    };
    let mut reading = format!(
        "With {} kept, the mapper's cache answers {} of {} questions; of the {} others the full cache answers {lost}.",
        percent_text(ratio),
        right.len(),
        asked.len(),
        wrong.len()
    );
    if let (Some(of_right), Some(of_wrong)) = (mean(&right), mean(&wrong)) {
        reading += &format!(
            " Of a fact's own KV pairs it keeps {} where the answer is right and {} where it is wrong.",
            percent(of_right),
            percent(of_wrong)
        );
    }
    let spread = |of: Vec<&'_ Answers>| -> Vec<SampleRow> {
        // From all over the contexts, not the first ones.
        let step = of.len().div_ceil(SHOWN).max(1);
        of.into_iter().step_by(step).map(row).collect()
    };
    Some(Samples {
        reading,
        note: format!("Policy {}, {} kept. Wrong answers first.", policy.name(), percent_text(ratio)),
        tables: tables(methods, all, policy, ratio),
        rows: [spread(wrong), spread(right)].concat(),
    })
}

fn row(asked: &Answers) -> SampleRow {
    let answer = |s: &FactAnswer| Answer { text: s.answer.clone(), is_right: s.is_right };
    let Answers { full, kvzip, mapper } = asked;
    let absent = || Answer { text: "–".to_owned(), is_right: false };
    SampleRow {
        question: full.question.clone(),
        kind: full.kind.clone(),
        wanted: full.wanted.clone(),
        answers: vec![answer(full), kvzip.map_or_else(absent, answer), answer(mapper)],
        kept: mapper.kept.map_or_else(|| "–".to_owned(), percent),
        depth: full.depth.map_or_else(|| "–".to_owned(), percent),
    }
}

/// Share answered by each method in each group of questions.
fn tables(methods: Methods, all: &[FactAnswer], policy: Policy, ratio: f64) -> Vec<Table> {
    let mut lengths: Vec<u32> = all.iter().filter_map(|s| s.context_tokens).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let middle = lengths.get(lengths.len() / 2).copied();
    let kind = |s: &FactAnswer| (!s.kind.is_empty()).then(|| s.kind.clone());
    let depth = |s: &FactAnswer| {
        let part = (s.depth?.clamp(0.0, 1.0) * DEPTHS.len() as f64) as usize;
        Some(DEPTHS[part.min(DEPTHS.len() - 1)].to_owned())
    };
    let length = move |s: &FactAnswer| {
        let (n, middle) = (s.context_tokens?, middle?);
        Some(if n < middle { format!("below {middle} tokens") } else { format!("{middle} tokens or more") })
    };
    let order: Vec<String> = DEPTHS.map(str::to_owned).to_vec();
    let mut out = vec![
        table(methods, "kind of fact", all, (policy, ratio), &kind, &[]),
        table(methods, "place of the fact in its context", all, (policy, ratio), &depth, &order),
    ];
    if lengths.len() > 1 {
        out.push(table(methods, "length of the context", all, (policy, ratio), &length, &[]));
    }
    out.into_iter().filter(|t| !t.columns.is_empty()).collect()
}

fn table(
    methods: Methods,
    what: &str,
    all: &[FactAnswer],
    (policy, ratio): (Policy, f64),
    group: &dyn Fn(&FactAnswer) -> Option<String>,
    order: &[String],
) -> Table {
    let mut groups: Vec<String> = all.iter().filter_map(group).collect();
    groups.sort_by_key(|g| (order.iter().position(|o| o == g), g.clone()));
    groups.dedup();
    let share = |method: Option<MethodName>, wanted: &str| {
        let mine = all.iter().filter(|s| s.cell == method.map(|m| (m, policy, ratio)));
        let rights: Vec<bool> =
            mine.filter(|s| group(s).as_deref() == Some(wanted)).map(|s| s.is_right).collect();
        let right = rights.iter().filter(|r| **r).count();
        (!rights.is_empty()).then(|| (right as f64 / rights.len() as f64, rights.len()))
    };
    let cell = |method, g: &String| {
        let (share, _) = share(method, g)?;
        Some(Cell { value: points(share), interval: String::new(), best: false })
    };
    let cells = |method: Option<MethodName>| groups.iter().map(|g| cell(method, g)).collect();
    let full =
        Row { name: "full cache".to_owned(), class: "full".to_owned(), reference: true, cells: cells(None) };
    let asked = methods.oracles_first(all.iter().filter_map(|s| s.cell).map(|c| c.0));
    let rows = asked.into_iter().map(|m| Row {
        name: m.name().to_owned(),
        class: methods.class(m),
        reference: methods.is_oracle(m),
        cells: cells(Some(m)),
    });
    Table {
        caption: format!("Questions answered by {what}, percent, at {} kept", percent_text(ratio)),
        note: "In brackets: questions.".to_owned(),
        rows: [full].into_iter().chain(rows).filter(|r| r.cells.iter().any(Option::is_some)).collect(),
        columns: groups.iter().map(|g| format!("{g} ({})", share(None, g).map_or(0, |s| s.1))).collect(),
        ..Table::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::METHODS;

    fn sample(question: u32, method: Option<MethodName>, is_right: bool) -> FactAnswer {
        FactAnswer {
            place: (0, question),
            question: format!("question {question}"),
            wanted: "4711".to_owned(),
            cell: method.map(|m| (m, Policy::Pair, 0.05)),
            answer: if is_right { "4711" } else { "<b>" }.to_owned(),
            is_right,
            context_tokens: Some(500),
            kind: if question < 2 { "city" } else { "owner" }.to_owned(),
            depth: Some(f64::from(question) / 4.0),
            kept: method.map(|_| if is_right { 0.4 } else { 0.1 }),
        }
    }

    fn four() -> Vec<FactAnswer> {
        let of = |q| {
            [
                sample(q, None, true),
                sample(q, Some(MethodName::KVZIP), q != 3),
                sample(q, Some(MethodName::MAPPER), q < 2),
            ]
        };
        (0..4).flat_map(of).collect()
    }

    #[test]
    fn wrong_answers_come_first_with_what_was_kept() {
        let found = samples(METHODS, &four(), Policy::Pair, 0.05).unwrap();
        let shown: Vec<&str> = found.rows.iter().map(|r| r.question.as_str()).collect();
        assert_eq!(shown, ["question 2", "question 3", "question 0", "question 1"]);
        assert_eq!(found.rows[0].kept, "10.0%");
        let said: Vec<bool> = found.rows[0].answers.iter().map(|a| a.is_right).collect();
        assert_eq!(said, [true, true, false]);
        assert!(
            found.reading.contains("answers 2 of 4 questions; of the 2 others the full cache answers 2."),
            "{}",
            found.reading
        );
        assert!(found.reading.contains("40.0% where the answer is right and 10.0%"), "{}", found.reading);
        assert!(samples(METHODS, &four(), Policy::Token, 0.05).is_none());
    }

    #[test]
    fn questions_are_grouped_by_kind_and_depth() {
        let found = samples(METHODS, &four(), Policy::Pair, 0.05).unwrap();
        let [kind, depth] = found.tables.as_slice() else { panic!("contexts of one length make no table") };
        assert_eq!(kind.columns, ["city (2)", "owner (2)"]);
        assert_eq!(depth.columns[0], "first quarter (1)");
        assert_eq!(depth.columns[3], "last quarter (1)");
        let row = |t: &Table, name: &str| -> Vec<String> {
            let row = t.rows.iter().find(|r| r.name == name).unwrap();
            row.cells.iter().map(|c| c.as_ref().unwrap().value.clone()).collect()
        };
        assert_eq!(row(kind, "mapper"), ["100", "0.0"]);
        assert_eq!(row(kind, "kvzip"), ["100", "50.0"]);
    }
}
