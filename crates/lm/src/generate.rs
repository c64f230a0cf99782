//! The greedy decoder: for one sequence, for many branches of one context, and for a pruned cache.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use pkv_core::hinted;
use tch::{Device, Tensor};

use crate::branches::Branches;
use crate::cache::KvCache;
use crate::model::LanguageModel;
use crate::ragged::RaggedCache;
use crate::tap::NoTap;

/// Tokens that a GPU decodes before the host looks at them.
const TOKENS_AT_ONCE: usize = 4;

/// Gets every token of an answer as it comes, `None` for a stop token, and may end the answer.
pub type Each<'a> = &'a mut dyn FnMut(Option<u32>) -> Result<ControlFlow<()>>;

/// Sequences that read in step.
trait Sequences {
    /// Hidden states `[rows, s, hidden]` of new tokens `[rows, s]`.
    fn read(&mut self, model: &LanguageModel, ids_rs: &Tensor) -> Result<Tensor>;

    /// Keep these rows alone.
    fn retain(&mut self, rows: &[usize]) -> Result<()>;
}

impl Sequences for Branches {
    fn read(&mut self, model: &LanguageModel, ids_rs: &Tensor) -> Result<Tensor> {
        model.forward_branches(ids_rs, self)
    }

    fn retain(&mut self, rows: &[usize]) -> Result<()> {
        Self::retain(self, rows)
    }
}

impl Sequences for RaggedCache {
    fn read(&mut self, model: &LanguageModel, ids_rs: &Tensor) -> Result<Tensor> {
        model.forward_ragged(ids_rs, self)
    }

    fn retain(&mut self, rows: &[usize]) -> Result<()> {
        Self::retain(self, rows)
    }
}

/// One row, which is never left out.
impl Sequences for KvCache {
    fn read(&mut self, model: &LanguageModel, ids_rs: &Tensor) -> Result<Tensor> {
        Ok(model.forward(&ids_rs.squeeze_dim(0), self, &mut NoTap)?.unsqueeze(0))
    }

    fn retain(&mut self, _: &[usize]) -> Result<()> {
        Ok(())
    }
}

impl LanguageModel {
    /// Read `ids` after the cache and answer greedily: at most `max_new` tokens, ended by a token
    /// of `stop`, which is not part of the answer.
    ///
    /// The cache then holds `ids` and the answer, but for the answer's last token.
    ///
    /// # Errors
    /// As [`LanguageModel::forward`]; also where the model's numbers are not finite.
    pub fn generate(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        max_new: usize,
        stop: &[u32],
    ) -> Result<Vec<u32>> {
        ensure!(!ids.is_empty(), "there is no token to answer");
        self.answer_one(ids, cache, max_new, stop, &mut |_| Ok(ControlFlow::Continue(())))
    }

    /// Read `ids` in the one sequence of the cache and answer greedily, as [`LanguageModel::generate`].
    ///
    /// # Errors
    /// As [`LanguageModel::forward_ragged`], and those of `each`.
    pub fn generate_ragged(
        &self,
        ids: &[u32],
        cache: &mut RaggedCache,
        max_new: usize,
        stop: &[u32],
        each: Each,
    ) -> Result<Vec<u32>> {
        ensure!(!ids.is_empty() && cache.sequences() == 1, "expected a question for one sequence");
        self.answer_one(ids, cache, max_new, stop, each)
    }

    /// Answer greedily in every branch; `questions` are read first, one per row of `branches`.
    ///
    /// Rows may differ in length. Each answer ends as in [`LanguageModel::generate`]; rows that ended early
    /// may have left the branches by then, or hold more tokens than their answers have.
    ///
    /// # Errors
    /// As [`LanguageModel::forward_branches`]; also an empty question or another number of them.
    pub fn generate_branches(
        &self,
        questions: &[&[u32]],
        branches: &mut Branches,
        max_new: usize,
        stop: &[u32],
    ) -> Result<Vec<Vec<u32>>> {
        let rows = questions.len();
        ensure!(
            rows == branches.rows(),
            "expected {} questions, one per branch, found {rows}",
            branches.rows()
        );
        ensure!(
            questions.iter().all(|ids| !ids.is_empty()),
            "there is no token to answer in one of the questions"
        );
        if max_new == 0 {
            return Ok(vec![Vec::new(); rows]);
        }
        let widest = questions.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let mut padded = vec![0i64; rows * widest];
        for (row, ids) in padded.chunks_mut(widest.max(1)).zip(questions) {
            row.iter_mut().zip(*ids).for_each(|(to, id)| *to = i64::from(*id));
        }
        let ids_rs = Tensor::from_slice(&padded).view([rows as i64, widest as i64]);
        let before = branches.lengths().to_vec();
        let hidden_rsm = self.forward_branches(&ids_rs, branches)?;
        // Padding is dropped, so that each row continues after its own question.
        let lengths: Vec<usize> = before.iter().zip(questions).map(|(n, ids)| n + ids.len()).collect();
        branches.truncate(&lengths)?;
        let last: Vec<i64> = questions.iter().map(|ids| ids.len() as i64 - 1).collect();
        let last_r = Tensor::from_slice(&last).to_device(self.device());
        let index = last_r.view([-1, 1, 1]).expand([-1, 1, hidden_rsm.size()[2]], false);
        let hidden_rm = hidden_rsm.gather(1, &index, false).squeeze_dim(1);

        self.answer(self.most_likely(&hidden_rm), branches, &vec![max_new; rows], stop, None)
    }

    /// Go on answering in every branch: read `next`, one token per row, and add at most `limits[row]` tokens
    /// to it.
    ///
    /// Answers are without `next`; for the rest as [`LanguageModel::generate_branches`].
    ///
    /// # Errors
    /// As [`LanguageModel::forward_branches`]; also another number of rows.
    pub fn continue_branches(
        &self,
        next: &[u32],
        branches: &mut Branches,
        limits: &[usize],
        stop: &[u32],
    ) -> Result<Vec<Vec<u32>>> {
        let rows = branches.rows();
        ensure!(
            next.len() == rows && limits.len() == rows,
            "expected {rows} tokens and limits, one per branch, found {} and {}",
            next.len(),
            limits.len()
        );
        let mut answers = vec![Vec::new(); rows];
        let open: Vec<usize> = (0..rows).filter(|&row| limits[row] > 0).collect();
        if open.is_empty() {
            return Ok(answers);
        }
        branches.retain(&open)?;
        let of_open = |all: &[usize]| open.iter().map(|&row| all[row]).collect::<Vec<_>>();
        let next_r = self.ids(&open.iter().map(|&row| next[row]).collect::<Vec<_>>());
        let hidden_rm = self.forward_branches(&next_r.unsqueeze(1), branches)?.squeeze_dim(1);
        let of_rows = self.answer(self.most_likely(&hidden_rm), branches, &of_open(limits), stop, None)?;
        open.iter().zip(of_rows).for_each(|(&row, answer)| answers[row] = answer);
        Ok(answers)
    }

    fn answer_one(
        &self,
        ids: &[u32],
        sequence: &mut dyn Sequences,
        max_new: usize,
        stop: &[u32],
        each: Each,
    ) -> Result<Vec<u32>> {
        if max_new == 0 {
            return Ok(Vec::new());
        }
        let hidden_1sm = sequence.read(self, &self.ids(ids).unsqueeze(0))?;
        let last_1m = hidden_1sm.select(1, ids.len() as i64 - 1);
        ensure!(
            last_1m.isfinite().all().int64_value(&[]) == 1,
            hinted(
                "the model's hidden state after the question is not finite: there is no answer",
                "its weights are damaged (compare their hashes), or its numbers overflow in this dtype: compute in f32"
            )
        );
        let first_1 = self.most_likely(&last_1m);
        Ok(self.answer(first_1, sequence, &[max_new], stop, Some(each))?.remove(0))
    }

    /// Answers that begin with `id_r`, i64 `[rows]`, which no row has read; no limit is 0. `each` gets the
    /// tokens of all rows and may end the answers.
    ///
    /// On a GPU several tokens are decoded before the host looks at them: it would wait for each. Rows that
    /// ended leave once half of the batch has.
    fn answer(
        &self,
        mut id_r: Tensor,
        sequences: &mut dyn Sequences,
        limits: &[usize],
        stop: &[u32],
        mut each: Option<Each>,
    ) -> Result<Vec<Vec<u32>>> {
        let at_once = if self.device().is_cuda() && each.is_none() { TOKENS_AT_ONCE } else { 1 };
        let mut answers: Vec<Vec<u32>> = vec![Vec::new(); limits.len()];
        // The answer that each branch gives, and whether it has not ended.
        let mut rows: Vec<(usize, bool)> = (0..limits.len()).map(|row| (row, true)).collect();
        loop {
            let left =
                rows.iter().filter(|(_, open)| *open).map(|&(row, _)| limits[row] - answers[row].len());
            let mut ids = vec![id_r.shallow_clone()];
            for _ in 1..left.max().unwrap_or(0).min(at_once) {
                id_r = self.next(&id_r, sequences)?;
                ids.push(id_r.shallow_clone());
            }
            let ids = Vec::<Vec<i64>>::try_from(&Tensor::stack(&ids, 1).to_device(Device::Cpu))?;
            for ((row, open), ids) in rows.iter_mut().zip(ids) {
                for id in ids.into_iter().map(|id| id as u32) {
                    if !*open {
                        break;
                    }
                    let ended = stop.contains(&id);
                    if !ended {
                        answers[*row].push(id);
                    }
                    *open = !ended && answers[*row].len() < limits[*row];
                    if let Some(each) = &mut each
                        && each((!ended).then_some(id))?.is_break()
                    {
                        return Ok(answers);
                    }
                }
            }
            let open: Vec<usize> = (0..rows.len()).filter(|&at| rows[at].1).collect();
            if open.is_empty() {
                return Ok(answers);
            }
            if 2 * open.len() <= rows.len() {
                sequences.retain(&open)?;
                let at: Vec<i64> = open.iter().map(|at| *at as i64).collect();
                id_r = id_r.index_select(0, &pkv_gpu::upload(&Tensor::from_slice(&at), self.device())?);
                rows.retain(|(_, open)| *open);
            }
            id_r = self.next(&id_r, sequences)?;
        }
    }

    /// The token after each of `id_r`.
    fn next(&self, id_r: &Tensor, sequences: &mut dyn Sequences) -> Result<Tensor> {
        Ok(self.most_likely(&sequences.read(self, &id_r.unsqueeze(1))?.squeeze_dim(1)))
    }

    /// i64 `[rows]`, on the model's device, of hidden states `[rows, hidden]`.
    fn most_likely(&self, hidden_rm: &Tensor) -> Tensor {
        self.logits(hidden_rm).argmax(-1, false)
    }
}
