//! `report`: one self-contained HTML file about the run.

use anyhow::Result;
use serde_json::json;

use super::Outcome;
use crate::session::Session;

pub fn run(s: &Session) -> Result<Outcome> {
    let written = pkv_report::write(s.run.root())?;
    Ok(Outcome::Done(json!({"file": written.html})))
}
