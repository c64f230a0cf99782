//! Text that RULER takes from elsewhere: essays, questions, more words.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;

use super::RulerTask;
use super::niah::{Haystack, Parameters};
use super::qa::QaSet;
use crate::files::Files;
use crate::rows;

/// Texts from which the tasks draw, in addition to their constants; a task whose source is absent cannot be
/// made.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Words of the essays that needles are hidden in; the reference has Paul Graham's.
    pub essay: Option<Rc<[String]>>,
    /// Paragraphs and questions of `qa_1`.
    pub squad: Option<Rc<QaSet>>,
    /// Paragraphs and questions of `qa_2`.
    pub hotpotqa: Option<Rc<QaSet>>,
    /// Words of `cwe` beyond the built-in 8,000: lists of that many words are longer than about 128,000
    /// tokens. The reference has `scripts/data/synthetic/json/english_words.json`.
    pub extra_words: Option<Vec<String>>,
}

impl Sources {
    /// Those that the benchmarks' files hold.
    ///
    /// # Errors
    /// A file is absent or of another form.
    pub fn open(files: &Files) -> Result<Self> {
        let one = |name| files.one(name).transpose();
        Ok(Self {
            essay: one("essays").map(|p| Self::read_essay(p?)).transpose()?.map(Rc::from),
            squad: one("squad").map(|p| QaSet::squad(p?)).transpose()?.map(Rc::new),
            hotpotqa: one("hotpotqa").map(|p| QaSet::hotpotqa(p?)).transpose()?.map(Rc::new),
            extra_words: one("words").map(|p| Self::read_words(p?)).transpose()?,
        })
    }

    /// Whether `task` has what it draws from.
    pub fn can_make(&self, task: RulerTask) -> bool {
        match task {
            RulerTask::Qa1 => self.squad.is_some(),
            RulerTask::Qa2 => self.hotpotqa.is_some(),
            _ => Parameters::of(task).is_none_or(|p| p.haystack != Haystack::Essay || self.essay.is_some()),
        }
    }

    /// Words of a text file, or of the key `text` of a JSON file, as the reference keeps its essays.
    ///
    /// # Errors
    /// The file is absent or holds no word.
    pub fn read_essay(path: &Path) -> Result<Vec<String>> {
        let form = || {
            hinted(
                format!("`{}` holds no words", path.display()),
                "give a text file, or a JSON object as RULER's scripts make it, with the text under the key `text`",
            )
        };
        let text = match path.extension().and_then(|e| e.to_str()) {
            Some("json") => rows::filled(&rows::json(path)?, "text").with_context(form)?.to_owned(),
            _ => rows::utf8(path)?,
        };
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        ensure!(!words.is_empty(), form());
        Ok(words)
    }

    /// The values of a JSON object, or the words of a text file.
    ///
    /// # Errors
    /// The file is absent or of another form.
    pub fn read_words(path: &Path) -> Result<Vec<String>> {
        if path.extension().is_none_or(|e| e != "json") {
            return Self::read_essay(path);
        }
        let json = rows::json(path)?;
        let words: Option<Vec<String>> =
            json.as_object().and_then(|o| o.values().map(|v| v.as_str().map(str::to_owned)).collect());
        words.filter(|words| words.iter().any(|w| !w.trim().is_empty())).with_context(|| {
            hinted(
                format!("`{}` holds no words", path.display()),
                "give a text file, or a JSON object whose values are words, such as RULER's `english_words.json`",
            )
        })
    }
}
