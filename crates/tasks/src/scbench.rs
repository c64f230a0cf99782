//! SCBench (arXiv 2412.10319): 12 tasks with several turns per context, read from the data set's own files.
//!
//! Facts of microsoft/MInference at commit fb56c91: prompts and answer lengths of `scbench/eval_utils.py`,
//! metrics of `scbench/compute_scores.py`. The hub keeps the rows in `microsoft/SCBench`: `id`, `context` and
//! `multi_turns`, a list of `input`, `answer` and, by task, `options`, `task`, `name`.
//!
//! Both modes cut the prompt at the context's end (the reference's multi-request mode does so too), and the
//! turns of a conversation see the wanted answers of the turns before them (its default, golden context).

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_recipe::EvalSection;
pub use pkv_recipe::SharedContext as Mode;
use pkv_recipe::plan::TaskWork;
use serde_json::{Value, json};

use crate::example::{Example, Turn};
use crate::metric::Metric;
use crate::rows::{self, Row};
use crate::suite::{Benchmark, Opening, Suite};

/// SCBench as a suite.
pub struct ScBench;

impl Suite for ScBench {
    fn name(&self) -> &'static str {
        "scbench"
    }

    fn tasks(&self) -> Vec<&'static str> {
        Task::ALL.map(Task::name).to_vec()
    }

    fn open<'a>(&self, from: &Opening<'a>) -> Result<Vec<Benchmark<'a>>> {
        let mode = from.section.benchmark.scbench_mode;
        let read = |name: &str, files: &[PathBuf], limit| {
            Task::named(name).expect("it is one of SCBench's names").read(files, mode, limit)
        };
        from.of_files(self, &json!({ "mode": mode }), read)
    }

    fn work(&self, section: &EvalSection, named: &[&str]) -> Vec<TaskWork> {
        /// 4,853 queries in 931 sessions (arXiv 2412.10319, section 3).
        const TURNS: usize = 5;
        let work = |task: Task| {
            let name = format!("{}.{}", self.name(), task.name());
            let one = TaskWork::of_prompts(name, &section.benchmark, task.longest_answer());
            TaskWork { questions: TURNS, ..one }
        };
        let chosen = Task::ALL.into_iter().filter(|t| named.is_empty() || named.contains(&t.name()));
        chosen.map(work).collect()
    }
}

pkv_core::named! {
    /// A task of SCBench, in the order of the reference's readme; each with the name of its files.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum Task {
        Kv = "scbench_kv";
        PrefixSuffix = "scbench_prefix_suffix";
        Vt = "scbench_vt";
        Repoqa = "scbench_repoqa";
        QaEng = "scbench_qa_eng";
        QaChn = "scbench_qa_chn";
        ChoiceEng = "scbench_choice_eng";
        ManyShot = "scbench_many_shot";
        Summary = "scbench_summary";
        Mf = "scbench_mf";
        SummaryWithNeedles = "scbench_summary_with_needles";
        RepoqaAndKv = "scbench_repoqa_and_kv";
    }
}

impl Task {
    /// Maximum number of tokens of an answer to `part` (`DATA_NAME_TO_MAX_NEW_TOKENS`).
    fn max_new_tokens(self, part: Part) -> usize {
        match (self, part) {
            (Self::SummaryWithNeedles, Part::Summary) => 800,
            (Self::RepoqaAndKv, Part::Kv) => 80,
            (Self::Kv | Self::PrefixSuffix, _) => 150,
            (Self::Vt, _) => 30,
            (Self::QaEng | Self::QaChn | Self::ChoiceEng, _) => 40,
            (Self::ManyShot, _) => 10,
            (Self::Mf, _) => 5,
            (_, Part::Repoqa) => 1024,
            (_, Part::Passkey) => 15,
            (Self::Summary, _) => 200,
            (_, part) => unreachable!("{} has no turns of {part:?}", self.name()),
        }
    }

    /// The most that any of its turns may take.
    fn longest_answer(self) -> usize {
        match self {
            Self::SummaryWithNeedles => 800,
            Self::Repoqa | Self::RepoqaAndKv => 1024,
            Self::Summary => 200,
            _ => self.max_new_tokens(Part::Kv),
        }
    }

    /// `multiturn_templates` before `{context}`.
    const fn before(self) -> &'static str {
        match self {
            Self::Kv => "Extract the value corresponding to the specified key in the JSON object below.\n\n",
            Self::Repoqa => {
                "Based on the function description and code context, please retrieve and repeat the exact described \
                 function from the code context in a code block wrapped by ```:\n\n"
            }
            Self::ChoiceEng => "Read the book and answer the question.\n\n",
            Self::QaEng => "Read the book and answer the question. Be very concise in your answer.\n\n",
            Self::QaChn => "阅读以下书籍然后回答问题。\n\n",
            _ => "",
        }
    }

    /// The examples of a task's files, one after the other, at most `limit`.
    ///
    /// # Errors
    /// A file is absent or damaged, or a row is not one of this task: it lacks a column, or one is empty, of
    /// another type, or of a form that the metric cannot read.
    pub fn read(self, paths: &[PathBuf], mode: Mode, limit: usize) -> Result<Vec<Example>> {
        let of_code = matches!(self, Self::Repoqa | Self::RepoqaAndKv);
        let rows = rows::read_all(paths, if of_code { usize::MAX } else { limit })?;
        let unfit = |row: &Row| {
            hinted(
                format!("{} is none of SCBench's `{}`", row.place, self.name()),
                "give the files of the hub's microsoft/SCBench: each row has `context` and `multi_turns`, a list of \
                 objects with `input` and `answer`",
            )
        };
        // Functions of one repository compete, those asked in other rows too.
        let mut functions: HashMap<&str, Vec<String>> = HashMap::new();
        if of_code {
            for row in &rows {
                let (repo, own) = self.functions(&row.value).with_context(|| unfit(row))?;
                functions.entry(repo).or_default().extend(own);
            }
        }
        let example = |(i, row): (usize, &Row)| {
            self.example(i, &row.value, mode, &functions).with_context(|| unfit(row))
        };
        rows.iter().take(limit).enumerate().map(example).collect()
    }

    /// The repository of a row, and the functions that its turns want.
    fn functions(self, row: &Value) -> Result<(&str, Vec<String>)> {
        let repo = rows::filled(row, "repo")?;
        let mut wanted = Vec::new();
        for (i, turn) in rows::list(row, "multi_turns")?.iter().enumerate() {
            let turn_of = || format!("`multi_turns[{i}]`");
            if self.part(turn).with_context(turn_of)? == Part::Repoqa {
                wanted.push(rows::filled(turn, "answer").with_context(turn_of)?.to_owned());
            }
        }
        Ok((repo, wanted))
    }

    fn example(
        self,
        index: usize,
        row: &Value,
        mode: Mode,
        functions: &HashMap<&str, Vec<String>>,
    ) -> Result<Example> {
        let other = row.get("context").is_none() && row.get("input").is_some();
        let context = rows::filled(row, if other { "input" } else { "context" })?;
        let asked = rows::list(row, "multi_turns")?;
        let others = match row.get("repo").and_then(Value::as_str) {
            Some(repo) => functions.get(repo).cloned().unwrap_or_default(),
            None => Vec::new(),
        };
        let mut before = self.before().to_owned();
        if self == Self::Mf {
            // The first question comes before the numbers too: by itself in requests, in its own words in
            // conversations.
            let input = rows::filled(&asked[0], "input").context("`multi_turns[0]`")?;
            let first = if mode == Mode::MultiRequest { input.to_owned() } else { mf_question(input)? };
            before = format!("{first}\n\n");
        }
        let turn = |(i, turn): (usize, &Value)| {
            self.turn(turn, i == 0 || mode == Mode::MultiRequest, &others)
                .with_context(|| format!("`multi_turns[{i}]`"))
        };
        Ok(Example {
            id: row.get("id").map_or_else(|| format!("{}-{index}", self.name()), rows::spell),
            context: format!("{before}{context}"),
            turns: asked.iter().enumerate().map(turn).collect::<Result<_>>()?,
            conversation: mode == Mode::MultiTurn,
            chat: true,
        })
    }

    /// `first`: whether the turn follows the context and not another turn.
    fn turn(self, turn: &Value, first: bool, others: &[String]) -> Result<Turn> {
        let part = self.part(turn)?;
        let input = rows::filled(turn, "input")?;
        let gap = if first { "\n\n" } else { "" };
        let question = match self {
            Self::ChoiceEng => {
                let options = rows::scalars(turn, "options")?;
                ensure!(options.len() == 4, "column `options` has {} entries, expected 4", options.len());
                let [a, b, c, d] = [0, 1, 2, 3].map(|i| &options[i]);
                format!("Question: {input}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n\nThe the correct answer is")
            }
            Self::QaEng => format!("Question: {input}\nAnswer:"),
            Self::QaChn => format!("问题：{input}\n答案："),
            Self::Mf => format!("{}\n\n{input}", mf_question(input)?),
            _ => input.to_owned(),
        };
        let mut wanted = rows::scalars(turn, "answer")?;
        // As Python spells a list: what the reference's conversations contain.
        let given = match rows::column(turn, "answer")? {
            Value::Array(_) => {
                format!("[{}]", wanted.iter().map(|w| format!("'{w}'")).collect::<Vec<_>>().join(", "))
            }
            _ => wanted[0].clone(),
        };
        if part == Part::Choice {
            // `get_ground_truth`: the option's text and its letter.
            let options = rows::scalars(turn, "options")?;
            let at = options.iter().position(|o| *o == wanted[0]);
            let at =
                at.with_context(|| format!("column `answer` holds {:?}, none of `options`", wanted[0]))?;
            wanted.push(char::from(b"ABCD"[at.min(3)]).to_string());
        }
        let turn = Turn {
            question: format!("{gap}{question}"),
            answer_prefix: String::new(),
            given,
            wanted,
            others: if part == Part::Repoqa { others.to_vec() } else { Vec::new() },
            metric: part.metric(),
            max_new_tokens: self.max_new_tokens(part),
            first_line: false,
            part: match self {
                Self::SummaryWithNeedles | Self::RepoqaAndKv => rows::text(turn, "task")?.to_owned(),
                _ => self.name().to_owned(),
            },
        };
        turn.check_form("answer")?;
        Ok(turn)
    }

    fn part(self, turn: &Value) -> Result<Part> {
        Ok(match self {
            Self::Kv | Self::PrefixSuffix => Part::Kv,
            Self::Vt => Part::Vt,
            Self::Repoqa => Part::Repoqa,
            Self::QaEng => Part::QaEng,
            Self::QaChn => Part::QaChn,
            Self::ChoiceEng => Part::Choice,
            Self::ManyShot => Part::ManyShot,
            Self::Summary => Part::Summary,
            Self::Mf => Part::Mf,
            Self::SummaryWithNeedles | Self::RepoqaAndKv => match (self, rows::text(turn, "task")?) {
                (Self::SummaryWithNeedles, "scbench_summary") => Part::Summary,
                (Self::SummaryWithNeedles, "scbench_passkey") => Part::Passkey,
                (Self::RepoqaAndKv, "scbench_repoqa") => Part::Repoqa,
                (Self::RepoqaAndKv, "scbench_kv") => Part::Kv,
                (_, other) => bail!(hinted(
                    format!("column `task` says `{other}`, which `{}` does not mix", self.name()),
                    "check that the file is this task's"
                )),
            },
        })
    }
}

/// Kind of a turn; mixed tasks have two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Kv,
    Vt,
    Repoqa,
    QaEng,
    QaChn,
    Choice,
    ManyShot,
    Summary,
    Mf,
    Passkey,
}

impl Part {
    /// `NAME_TO_SCORE_GETTER` through `Multiturnbench_to_Infinitebench`.
    const fn metric(self) -> Metric {
        match self {
            Self::Kv => Metric::Contains,
            Self::Vt => Metric::StringMatchAllRounded,
            Self::Repoqa => Metric::Function,
            // Differs for `ManyShot`: the reference walks through the letters of an answer that is no list,
            // so that any answer with a bracket in it counts; here the whole answer must be found.
            Self::QaEng | Self::ManyShot => Metric::ContainsAnyCase,
            Self::QaChn => Metric::QaF1ZhCharacters,
            Self::Choice => Metric::Choice,
            Self::Summary => Metric::RougeLsum,
            Self::Mf => Metric::MathFind,
            Self::Passkey => Metric::FirstNumber,
        }
    }
}

/// `The largest number is` becomes `What is the largest number?`.
fn mf_question(input: &str) -> Result<String> {
    let line = input.lines().find_map(|line| {
        let start = line.find("The ")?;
        // `The .+ is`: greedy, up to the last ` is`, with at least one character between.
        let end = line.rfind(" is").filter(|end| *end > start + 4)?;
        Some(&line[start..end])
    });
    let line = line.with_context(|| format!("column `input` holds {input:?}, expected `The ... is`"))?;
    Ok(format!("What is {}?", line.to_lowercase()))
}

#[cfg(test)]
mod tests;
