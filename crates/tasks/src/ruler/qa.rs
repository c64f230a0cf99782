//! Questions about documents among other documents: `scripts/data/synthetic/qa.py`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Rng, hinted};
use serde_json::Value;

use super::Draft;
use crate::draw::{sample, shuffle};
use crate::rows;

/// `constants.py`, `qa`: `{q}` means `query`.
const INTRODUCTION: &str = "Answer the question based on the given documents. Only give me the answer and do not output any \
                            other words.\n\nThe following are given documents.\n\n";
const QUESTION: &str = "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any \
                        other words.\n\nQuestion: {q}";
const ANSWER_PREFIX: &str = " Answer:";

/// A question and the documents it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub question: String,
    /// Any of them counts.
    pub answers: Vec<String>,
    /// Documents that stand in every context of this question.
    pub documents: Vec<usize>,
    /// Documents of the same article, which come before those of others.
    pub related: Vec<usize>,
}

/// A set of questions with all its documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QaSet {
    /// Each once, sorted.
    pub documents: Vec<String>,
    /// In the file's order.
    pub questions: Vec<Question>,
}

impl QaSet {
    /// SQuAD 2.0: the original JSON file (`dev-v2.0.json`), or rows with `title`, `context`, `question`,
    /// `answers`, as the hub has them. Questions that have no answer are left out.
    ///
    /// # Errors
    /// The file is absent or of another form.
    pub fn squad(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            // (article, paragraph, question, answers)
            let mut asked: Vec<(String, String, String, Vec<String>)> = Vec::new();
            let mut paragraphs: Vec<(String, String)> = Vec::new();
            match original(path)? {
                Some(file) => {
                    for (i, article) in rows::list(&file, "data")?.iter().enumerate() {
                        for (k, paragraph) in rows::list(article, "paragraphs")?.iter().enumerate() {
                            let place = || format!("`data[{i}].paragraphs[{k}]`");
                            let context = rows::filled(paragraph, "context").with_context(place)?.to_owned();
                            let qas = rows::column(paragraph, "qas").with_context(place)?;
                            let qas = qas.as_array().with_context(|| rows::unfit("qas", qas, "a list"));
                            for (n, qa) in qas.with_context(place)?.iter().enumerate() {
                                let place = || format!("`data[{i}].paragraphs[{k}].qas[{n}]`");
                                let answers = squad_answers(qa).with_context(place)?;
                                let question = rows::filled(qa, "question").with_context(place)?.to_owned();
                                asked.push((i.to_string(), context.clone(), question, answers));
                            }
                            paragraphs.push((i.to_string(), context));
                        }
                    }
                }
                None => {
                    for (i, row) in rows::read(path)?.iter().enumerate() {
                        let place = || format!("row {}", i + 1);
                        let column = |name| rows::filled(row, name).map(str::to_owned).with_context(place);
                        let (title, context) = (column("title")?, column("context")?);
                        if paragraphs.last().is_none_or(|(_, last)| *last != context) {
                            paragraphs.push((title.clone(), context.clone()));
                        }
                        asked.push((
                            title,
                            context,
                            column("question")?,
                            squad_answers(row).with_context(place)?,
                        ));
                    }
                }
            }
            let documents = sorted(paragraphs.iter().map(|(_, text)| text.clone()));
            let index = index_of(&documents);
            let mut by_article: HashMap<&str, Vec<usize>> = HashMap::new();
            for (article, text) in &paragraphs {
                by_article.entry(article).or_default().push(index[text.as_str()]);
            }
            let answered = asked.iter().filter(|(.., answers)| !answers.is_empty());
            let question = |(article, text, question, answers): &(String, String, String, Vec<String>)| {
                let own = index[text.as_str()];
                let mut related = by_article[article.as_str()].clone();
                related.retain(|&d| d != own);
                Question {
                    question: question.clone(),
                    answers: answers.clone(),
                    documents: vec![own],
                    related,
                }
            };
            let questions = answered.map(question).collect();
            Ok(Self { questions, documents })
        };
        read().and_then(Self::checked).with_context(|| unreadable(path, "SQuAD 2.0", "dev-v2.0.json"))
    }

    /// HotpotQA with distractors: the original JSON file (`hotpot_dev_distractor_v1.json`), or rows with
    /// `question`, `answer` and `context`, as the hub has them.
    ///
    /// # Errors
    /// The file is absent or of another form.
    pub fn hotpotqa(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let rows = rows::read(path)?;
            let place = |i: usize| format!("row {}", i + 1);
            let texts =
                rows.iter().enumerate().map(|(i, row)| hotpot_documents(row).with_context(|| place(i)));
            let texts = texts.collect::<Result<Vec<_>>>()?;
            let documents = sorted(texts.iter().flatten().cloned());
            let index = index_of(&documents);
            let questions = rows.iter().zip(&texts).enumerate().map(|(i, (row, texts))| {
                let column = |name| rows::filled(row, name).map(str::to_owned).with_context(|| place(i));
                Ok(Question {
                    question: column("question")?,
                    answers: vec![column("answer")?],
                    documents: texts.iter().map(|t| index[t.as_str()]).collect(),
                    related: Vec::new(),
                })
            });
            let questions = questions.collect::<Result<Vec<_>>>()?;
            Ok(Self { questions, documents })
        };
        read()
            .and_then(Self::checked)
            .with_context(|| unreadable(path, "HotpotQA", "hotpot_dev_distractor_v1.json"))
    }

    fn checked(self) -> Result<Self> {
        ensure!(!self.questions.is_empty(), "it holds no question that has an answer");
        Ok(self)
    }

    /// Fewest documents: those that questions are about.
    pub fn least(&self) -> usize {
        self.questions.iter().map(|q| q.documents.len()).max().unwrap_or(1)
    }

    pub fn most(&self) -> usize {
        usize::MAX / 4
    }

    pub(super) fn draft(&self, size: usize, index: usize, rng: &mut Rng) -> Result<Draft> {
        let Some(q) = self.questions.get(index) else {
            bail!(hinted(
                format!("the file holds {} questions, example {index} was asked for", self.questions.len()),
                "lower `eval.benchmark.examples`"
            ));
        };
        let mut documents: Vec<usize> = Vec::with_capacity(size);
        if size < self.documents.len() {
            documents.extend(&q.documents);
            let wanted = size.saturating_sub(q.documents.len());
            if wanted > q.related.len() {
                documents.extend(&q.related);
                let taken: std::collections::HashSet<usize> = documents.iter().copied().collect();
                let others: Vec<usize> = (0..self.documents.len()).filter(|d| !taken.contains(d)).collect();
                let n = (wanted - q.related.len()).min(others.len());
                documents.extend(sample(rng, others.len(), n).into_iter().map(|i| others[i]));
            } else {
                documents.extend(sample(rng, q.related.len(), wanted).into_iter().map(|i| q.related[i]));
            }
        } else {
            documents.extend((0..self.documents.len()).cycle().take(size));
        }
        shuffle(rng, &mut documents);
        let numbered = documents.iter().enumerate();
        // `DOCUMENT_PROMPT`.
        let numbered = numbered.map(|(i, &d)| format!("Document {}:\n{}", i + 1, self.documents[d]));
        let context = numbered.collect::<Vec<_>>().join("\n\n");
        Ok(Draft {
            context: format!("{INTRODUCTION}{context}"),
            question: QUESTION.replace("{q}", &q.question),
            answer_prefix: ANSWER_PREFIX.to_owned(),
            answers: q.answers.clone(),
        })
    }
}

/// A `.json` file that is one object; `None` of files of rows.
fn original(path: &Path) -> Result<Option<Value>> {
    if path.extension().is_none_or(|e| e != "json") {
        return Ok(None);
    }
    Ok(Some(rows::json(path)?).filter(Value::is_object))
}

/// The texts of `answers`, a list of objects in the original, an object of lists on the hub; none where a
/// question has no answer, as SQuAD 2.0 asks some.
fn squad_answers(qa: &Value) -> Result<Vec<String>> {
    let answers = rows::column(qa, "answers")?;
    match answers {
        Value::Array(all) => all.iter().map(|a| Ok(rows::filled(a, "text")?.to_owned())).collect(),
        Value::Object(_) if rows::column(answers, "text")?.as_array().is_some_and(Vec::is_empty) => {
            Ok(Vec::new())
        }
        _ => rows::texts(answers, "text").context("column `answers`"),
    }
}

/// `title`, a line break, and the sentences; the original has pairs, the hub two lists.
fn hotpot_documents(row: &Value) -> Result<Vec<String>> {
    let context = rows::column(row, "context")?;
    let join = |(i, (title, sentences)): (usize, (&Value, &Value))| {
        let lines = sentences.as_array().map(|all| all.iter().map(Value::as_str).collect::<Option<String>>());
        match (title.as_str(), lines.flatten()) {
            (Some(title), Some(lines)) if !lines.trim().is_empty() => Ok(format!("{title}\n{lines}")),
            _ => bail!("column `context`: document {} is not a title with a list of sentences", i + 1),
        }
    };
    if let Some(pairs) = context.as_array() {
        let pair = |p: (usize, &Value)| join((p.0, (&p.1[0], &p.1[1])));
        ensure!(!pairs.is_empty(), "column `context` is an empty list");
        return pairs.iter().enumerate().map(pair).collect();
    }
    let part = |name| rows::list(context, name).context("column `context`");
    let (titles, sentences) = (part("title")?, part("sentences")?);
    ensure!(
        titles.len() == sentences.len(),
        "column `context` has {} titles, {} documents",
        titles.len(),
        sentences.len()
    );
    titles.iter().zip(sentences).enumerate().map(join).collect()
}

fn sorted(texts: impl Iterator<Item = String>) -> Vec<String> {
    texts.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}

fn index_of(documents: &[String]) -> HashMap<&str, usize> {
    documents.iter().enumerate().map(|(i, d)| (d.as_str(), i)).collect()
}

fn unreadable(path: &Path, set: &str, name: &str) -> pkv_core::Hinted {
    hinted(
        format!("`{}` is no file of {set}", path.display()),
        format!("give `{name}`, or the hub's Parquet file of the validation split"),
    )
}
