//! Scores of answers: the metrics of RULER, LongBench and SCBench.
//!
//! Every metric gives a share in [0, 1] for one answer; means over examples are `eval`'s. Each is held
//! against the reference's own code on recorded answers (`tests/goldens`).

mod bleu;
mod chinese;
mod diff;
mod f1;
mod lcs;
mod longbench;
mod rouge;
mod scbench;
mod squad;

pub use squad::Squad;

use serde::{Deserialize, Serialize};

/// Metric of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// RULER `string_match_all`: share of the wanted texts that the answer contains.
    StringMatchAll,
    /// RULER `string_match_part`: whether it contains any of them.
    StringMatchPart,
    /// LongBench `qa_f1_score`: F1 of normalized words.
    QaF1,
    /// LongBench `qa_f1_zh_score`: F1 of Chinese words.
    QaF1Zh,
    /// LongBench `rouge_score`: ROUGE-L of the Python package rouge.
    RougeL,
    /// LongBench `rouge_zh_score`: the same over Chinese words.
    RougeLZh,
    /// LongBench `classification_score`: 1 over the number of classes named, if the right one is.
    Classification,
    /// LongBench `retrieval_score`: share of the numbers in the answer that are the paragraph's.
    Retrieval,
    /// LongBench `retrieval_zh_score`.
    RetrievalZh,
    /// LongBench `count_score`: share of the numbers in the answer that are the count.
    Count,
    /// LongBench `code_sim_score`: similarity of the first line of code.
    CodeSimilarity,
    /// SCBench `get_score_one_kv_retrieval`: whether the answer contains the wanted text as it is.
    Contains,
    /// SCBench `get_score_one_passkey`: whether its first number is the wanted one.
    FirstNumber,
    /// SCBench `get_score_one_math_find`: the same with decimals, compared as numbers.
    MathFind,
    /// SCBench `get_score_one_longdialogue_qa_eng`: whether it contains a wanted text, letter case aside.
    ContainsAnyCase,
    /// SCBench `get_score_one_longbook_choice_eng`: the letter of a choice.
    Choice,
    /// SCBench `qa_f1_score_zh`: F1 of Chinese characters.
    QaF1ZhCharacters,
    /// SCBench `get_score_one_longbook_sum_eng`: ROUGE-Lsum of the Python package rouge-score.
    RougeLsum,
    /// SCBench `string_match_all`: RULER's, rounded to two decimals.
    StringMatchAllRounded,
    /// SCBench `repo_qa_utils.compute_score` at threshold 0.8: whether the answer's code is nearer (BLEU) to
    /// the wanted function than to the repository's others, and near enough.
    Function,
}

impl Metric {
    /// Score of `answer` in [0, 1]; of several wanted answers the best counts.
    ///
    /// `others`: LongBench's classes; the other functions of a repository.
    ///
    /// ```
    /// use pkv_tasks::Metric;
    ///
    /// let wanted = ["the red bell".to_owned()];
    /// assert_eq!(Metric::QaF1.score("A red bell.", &wanted, &[]), 1.0);
    /// assert_eq!(Metric::QaF1.score("a bell", &wanted, &[]), 2.0 / 3.0);
    /// ```
    pub fn score(self, answer: &str, wanted: &[String], others: &[String]) -> f64 {
        let best = |score: &dyn Fn(&str) -> f64| wanted.iter().map(|w| score(w)).fold(0.0, f64::max);
        match self {
            Self::StringMatchAll => string_match_all(answer, wanted),
            Self::StringMatchPart => best(&|w| f64::from(contains_any_case(&cleaned(answer), w))),
            Self::QaF1 => best(&|w| f1::words(answer, w)),
            Self::QaF1Zh => best(&|w| chinese::f1(answer, w)),
            Self::RougeL => best(&|w| rouge::rouge_l(answer, w)),
            Self::RougeLZh => best(&|w| rouge::rouge_l(&chinese::spaced(answer), &chinese::spaced(w))),
            Self::Classification => best(&|w| longbench::classification(answer, w, others)),
            Self::Retrieval => best(&|w| longbench::retrieval(answer, w, "Paragraph ")),
            Self::RetrievalZh => best(&|w| longbench::retrieval(answer, w, "段落")),
            Self::Count => best(&|w| longbench::count(answer, w)),
            Self::CodeSimilarity => best(&|w| longbench::code_similarity(answer, w)),
            Self::Contains => best(&|w| f64::from(answer.contains(w))),
            Self::FirstNumber => best(&|w| f64::from(scbench::first_number(answer) == w)),
            Self::MathFind => best(&|w| f64::from(scbench::math_find(answer, w))),
            Self::ContainsAnyCase => {
                best(&|w| f64::from(answer.trim().to_uppercase().contains(&w.to_uppercase())))
            }
            Self::Choice => f64::from(scbench::choice(answer, wanted)),
            Self::QaF1ZhCharacters => best(&|w| f1::characters(answer, w)),
            Self::RougeLsum => best(&|w| rouge::rouge_lsum(answer, w)),
            // Python's `round` takes halves to the even.
            Self::StringMatchAllRounded => (100.0 * string_match(answer, wanted)).round_ties_even() / 100.0,
            Self::Function => best(&|w| f64::from(scbench::function(answer, w, others))),
        }
    }

    /// Whether each of so many wanted answers is a short one that counts alone: then exact match and token F1
    /// say something.
    pub fn is_short_answer(self, wanted: usize) -> bool {
        match self {
            Self::StringMatchPart | Self::QaF1 | Self::Contains | Self::ContainsAnyCase => true,
            Self::StringMatchAll | Self::StringMatchAllRounded => wanted == 1,
            _ => false,
        }
    }
}

fn string_match_all(answer: &str, wanted: &[String]) -> f64 {
    string_match(&cleaned(answer), wanted)
}

/// Share of `wanted` that `answer` contains, letter case aside.
fn string_match(answer: &str, wanted: &[String]) -> f64 {
    let found = wanted.iter().filter(|w| contains_any_case(answer, w)).count();
    if wanted.is_empty() { 0.0 } else { found as f64 / wanted.len() as f64 }
}

fn contains_any_case(answer: &str, wanted: &str) -> bool {
    answer.to_lowercase().contains(&wanted.to_lowercase())
}

/// RULER `evaluate.py`, `postprocess_pred`: control characters become line breaks.
fn cleaned(answer: &str) -> String {
    let text: String = answer.trim().chars().map(|c| if c < '\u{20}' { '\n' } else { c }).collect();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests;
