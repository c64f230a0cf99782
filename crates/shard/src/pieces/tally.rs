//! Rows in = done + skipped + failed: no row is lost without a word.

use anyhow::{Error, Result, ensure};
use pkv_core::{Hinted, hinted};

use super::{FailedRow, Marker};

/// Failures in a row that end a stage, unless the user says otherwise. A device that is broken fails at every
/// row, one odd context does not: three in a row are no accident, and cost the time of three contexts.
pub const MAX_FAILURES: usize = 3;

/// Rows that a process was given, and what became of them.
#[derive(Debug)]
pub struct Tally {
    pub rows: u64,
    pub done: u64,
    /// There before, made by another process, or not made because their shard lacks a row.
    pub skipped: u64,
    pub failed: Vec<FailedRow>,
    most: usize,
    in_a_row: usize,
    /// The first failure of this process.
    first: Option<Error>,
}

impl Tally {
    /// Of no rows yet; `most` failures in a row are too many.
    pub const fn new(most: usize) -> Self {
        Self { rows: 0, done: 0, skipped: 0, failed: Vec::new(), most, in_a_row: 0, first: None }
    }

    /// A row was made.
    pub const fn succeeded(&mut self) {
        self.in_a_row = 0;
    }

    /// A row failed; as it is recorded. It is not added to the failed ones: its piece is, when it ends.
    pub fn failed(&mut self, row: u64, id: &str, error: Error) -> FailedRow {
        let failed = FailedRow { row, id: id.to_owned(), error: format!("{error:#}") };
        tracing::warn!("row {row} (`{id}`) failed: {}", failed.error);
        self.in_a_row += 1;
        self.first.get_or_insert(error);
        failed
    }

    /// Whether so many rows failed one after another that no more are tried.
    pub const fn is_over(&self) -> bool {
        self.in_a_row >= self.most
    }

    /// Add a piece that this process has ended.
    pub fn add(&mut self, marker: &Marker) {
        self.rows += marker.rows;
        self.done += marker.done;
        self.skipped += marker.skipped;
        self.failed.extend(marker.failed.iter().cloned());
    }

    /// Add a piece that had ended, or another process has.
    pub fn add_earlier(&mut self, marker: &Marker) {
        self.add(marker);
        self.done -= marker.done;
        self.skipped += marker.done;
    }

    /// In words, if no row failed.
    ///
    /// # Errors
    /// Rows failed; the error names the first of them.
    pub fn finish(&mut self, stage: &str) -> Result<String> {
        let Self { rows, done, skipped, failed, .. } = &*self;
        let sum = format!("{rows} rows = {done} done + {skipped} skipped + {} failed", failed.len());
        ensure!(done + skipped + failed.len() as u64 == *rows, "rows were lost in `{stage}`: {sum}");
        let Some(FailedRow { row, id, error }) = failed.first() else { return Ok(sum) };
        let in_a_row = match self.is_over() {
            true => format!(", the last {} of them in a row, and no more were tried", self.in_a_row),
            false => String::new(),
        };
        let own = self.first.as_ref().and_then(|cause| cause.downcast_ref::<Hinted>());
        let hint = format!(
            "{}the same command tries them again, and keeps what is done; `--max-failures` ends `{stage}` after as many in \
             a row ({} now)",
            own.map_or_else(String::new, |cause| format!("{}; then ", cause.hint())),
            self.most
        );
        let which = format!("{sum}{in_a_row}; row {row} (`{id}`)");
        let of_another = format!("{which}: {error}");
        Err(match self.first.take() {
            Some(cause) => cause.context(hinted(which, hint).environment()),
            // Of another process: its text is all there is.
            None => hinted(of_another, hint).environment().into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use pkv_core::FailureKind;

    use super::*;

    #[test]
    fn rows_that_are_lost_are_noticed() {
        let tally = |rows, done| Tally { rows, done, skipped: 1, ..Tally::new(3) };
        assert_eq!(tally(4, 3).finish("label").unwrap(), "4 rows = 3 done + 1 skipped + 0 failed");
        let lost = tally(5, 3).finish("label").unwrap_err();
        assert_eq!(lost.to_string(), "rows were lost in `label`: 5 rows = 3 done + 1 skipped + 0 failed");
    }

    #[test]
    fn failures_count_in_a_row_and_keep_their_kind() {
        let mut tally = Tally::new(2);
        let refused = || Error::from(hinted("its scores are NaN", "take another dtype"));
        let first = tally.failed(3, "c", refused());
        tally.succeeded();
        tally.failed(5, "e", refused());
        assert!(!tally.is_over());
        tally.failed(6, "f", refused());
        assert!(tally.is_over());
        (tally.rows, tally.skipped, tally.failed) = (2, 1, vec![first]);
        let ended = tally.finish("label").unwrap_err();
        let text = format!("{ended:#}");
        assert!(text.contains("1 failed, the last 2 of them in a row"), "{text}");
        assert!(text.contains("row 3 (`c`): its scores are NaN"), "{text}");
        let hint = ended.downcast_ref::<Hinted>().unwrap().hint();
        assert!(hint.starts_with("take another dtype; then the same command"), "{hint}");
        assert_eq!(FailureKind::of(&ended), FailureKind::Input);
    }
}
