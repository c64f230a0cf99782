//! Questions about documents among other documents: `scripts/data/synthetic/qa.py`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Rng, hinted};
use serde_json::Value;

use super::Draft;
use crate::draw::{sample, shuffle};
use crate::rows;

/// `constants.py`, `qa`: `{q}` stands for `query`.
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
    /// SQuAD 2.0: the original JSON file (`dev-v2.0.json`), or rows with `title`, `context`, `question`, `answers`,
    /// as the hub has them. Questions that have no answer are left out.
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
                    for (i, article) in rows::list(&file, "data").iter().enumerate() {
                        for paragraph in rows::list(article, "paragraphs") {
                            let context = rows::text(paragraph, "context")?.to_owned();
                            for qa in rows::list(paragraph, "qas") {
                                let answers = rows::list(qa, "answers").iter();
                                let answers = answers.map(|a| Ok(rows::text(a, "text")?.to_owned()));
                                let answers = answers.collect::<Result<Vec<_>>>()?;
                                let question = rows::text(qa, "question")?.to_owned();
                                asked.push((i.to_string(), context.clone(), question, answers));
                            }
                            paragraphs.push((i.to_string(), context));
                        }
                    }
                }
                None => {
                    for row in rows::read(path)? {
                        let answers = row.get("answers").map(|a| rows::list(a, "text")).unwrap_or_default();
                        let (title, context) = (rows::text(&row, "title")?, rows::text(&row, "context")?);
                        if paragraphs.last().is_none_or(|(_, last)| last != context) {
                            paragraphs.push((title.to_owned(), context.to_owned()));
                        }
                        asked.push((
                            title.to_owned(),
                            context.to_owned(),
                            rows::text(&row, "question")?.to_owned(),
                            answers.iter().map(rows::spell).collect(),
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

    /// HotpotQA with distractors: the original JSON file (`hotpot_dev_distractor_v1.json`), or rows with `question`,
    /// `answer` and `context`, as the hub has them.
    ///
    /// # Errors
    /// The file is absent or of another form.
    pub fn hotpotqa(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let rows = rows::read(path)?;
            let texts = rows.iter().map(hotpot_documents).collect::<Result<Vec<_>>>()?;
            let documents = sorted(texts.iter().flatten().cloned());
            let index = index_of(&documents);
            let questions = rows.iter().zip(&texts).map(|(row, texts)| {
                Ok(Question {
                    question: rows::text(row, "question")?.to_owned(),
                    answers: vec![rows::text(row, "answer")?.to_owned()],
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

/// `title`, a line break, and the sentences; the original has pairs, the hub two lists.
fn hotpot_documents(row: &Value) -> Result<Vec<String>> {
    let context = row.get("context").context("column `context` is absent")?;
    let join = |title: &Value, sentences: &Value| {
        let sentences: String = sentences.as_array().into_iter().flatten().map(rows::spell).collect();
        format!("{}\n{sentences}", rows::spell(title))
    };
    if let Some(pairs) = context.as_array() {
        let pair =
            |p: &Value| Ok(join(p.get(0).context("a document has no title")?, p.get(1).context("nor text")?));
        return pairs.iter().map(pair).collect();
    }
    let (titles, sentences) = (rows::list(context, "title"), rows::list(context, "sentences"));
    ensure!(titles.len() == sentences.len(), "{} titles, {} documents", titles.len(), sentences.len());
    Ok(titles.iter().zip(sentences).map(|(t, s)| join(t, s)).collect())
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
