//! `report`: one self-contained HTML file about the run.

use anyhow::Result;
use pkv_shard::Stage;
use serde_json::json;

use super::{Entry, Outcome};
use crate::session::Session;

pub(super) const ENTRY: Entry = Entry::new(
    Stage::Report,
    "Write one self-contained HTML report of the run",
    &[Stage::Train, Stage::Eval, Stage::Export],
    |s, _| run(s),
);

fn run(s: &Session) -> Result<Outcome> {
    let written = pkv_report::write(s.run.root(), &pkv_eval::methods::infos())?;
    Ok(Outcome::Done(json!({"file": written.html.display().to_string()})))
}
