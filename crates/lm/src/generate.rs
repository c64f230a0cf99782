//! Greedy answers, for one sequence and for many branches of one context.

use anyhow::{Result, ensure};
use tch::{Device, Tensor};

use crate::branches::Branches;
use crate::cache::KvCache;
use crate::model::LanguageModel;
use crate::tap::NoTap;

/// Tokens that a GPU decodes before the host looks at them.
const TOKENS_AT_ONCE: usize = 4;

impl LanguageModel {
    /// Read `ids` behind the cache and answer greedily: at most `max_new` tokens, ended by a token
    /// of `stop`, which is not part of the answer.
    ///
    /// The cache then holds `ids` and the answer, but for the answer's last token.
    ///
    /// # Errors
    /// As [`LanguageModel::forward`].
    pub fn generate(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        max_new: usize,
        stop: &[u32],
    ) -> Result<Vec<u32>> {
        ensure!(!ids.is_empty(), "there is no token to answer");
        let mut answer = Vec::new();
        let mut next = self.ids(ids);
        while answer.len() < max_new {
            let hidden_sm = self.forward(&next, cache, &mut NoTap)?;
            let id_s = self.logits(&hidden_sm.slice(0, -1, None, 1)).argmax(-1, false);
            let id = id_s.int64_value(&[0]) as u32;
            if stop.contains(&id) {
                break;
            }
            answer.push(id);
            next = id_s;
        }
        Ok(answer)
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
        // Padding is dropped, so that each row goes on behind its own question.
        let lengths: Vec<usize> = before.iter().zip(questions).map(|(n, ids)| n + ids.len()).collect();
        branches.truncate(&lengths)?;
        let last: Vec<i64> = questions.iter().map(|ids| ids.len() as i64 - 1).collect();
        let last_r = Tensor::from_slice(&last).to_device(self.device());
        let index = last_r.view([-1, 1, 1]).expand([-1, 1, hidden_rsm.size()[2]], false);
        let hidden_rm = hidden_rsm.gather(1, &index, false).squeeze_dim(1);

        self.answer(self.most_likely(&hidden_rm), branches, &vec![max_new; rows], stop)
    }

    /// Go on answering in every branch: read `next`, one token per row, and add at most `limits[row]` tokens to it.
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
        let of_rows = self.answer(self.most_likely(&hidden_rm), branches, &of_open(limits), stop)?;
        open.iter().zip(of_rows).for_each(|(&row, answer)| answers[row] = answer);
        Ok(answers)
    }

    /// Answers that begin with `id_r`, i64 `[rows]`, which no branch has read; no limit is 0.
    ///
    /// On a GPU several tokens are decoded before the host looks at them: it would wait for each. Rows that ended leave once
    /// half of the batch has.
    fn answer(
        &self,
        mut id_r: Tensor,
        branches: &mut Branches,
        limits: &[usize],
        stop: &[u32],
    ) -> Result<Vec<Vec<u32>>> {
        let at_once = if self.device().is_cuda() { TOKENS_AT_ONCE } else { 1 };
        let mut answers: Vec<Vec<u32>> = vec![Vec::new(); limits.len()];
        // The answer that each branch gives, and whether it has not ended.
        let mut rows: Vec<(usize, bool)> = (0..limits.len()).map(|row| (row, true)).collect();
        loop {
            let left =
                rows.iter().filter(|(_, open)| *open).map(|&(row, _)| limits[row] - answers[row].len());
            let mut ids = vec![id_r.shallow_clone()];
            for _ in 1..left.max().unwrap_or(0).min(at_once) {
                id_r = self.next(&id_r, branches)?;
                ids.push(id_r.shallow_clone());
            }
            let ids = Vec::<Vec<i64>>::try_from(&Tensor::stack(&ids, 1).to_device(Device::Cpu))?;
            for ((row, open), ids) in rows.iter_mut().zip(ids) {
                for id in ids.into_iter().map(|id| id as u32) {
                    *open = *open && !stop.contains(&id);
                    if *open {
                        answers[*row].push(id);
                        *open = answers[*row].len() < limits[*row];
                    }
                }
            }
            let open: Vec<usize> = (0..rows.len()).filter(|&at| rows[at].1).collect();
            if open.is_empty() {
                return Ok(answers);
            }
            if 2 * open.len() <= rows.len() {
                branches.retain(&open)?;
                let at: Vec<i64> = open.iter().map(|at| *at as i64).collect();
                id_r = id_r.index_select(0, &pkv_gpu::upload(&Tensor::from_slice(&at), self.device())?);
                rows.retain(|(_, open)| *open);
            }
            id_r = self.next(&id_r, branches)?;
        }
    }

    /// The token after each of `id_r`.
    fn next(&self, id_r: &Tensor, branches: &mut Branches) -> Result<Tensor> {
        Ok(self.most_likely(&self.forward_branches(&id_r.unsqueeze(1), branches)?.squeeze_dim(1)))
    }

    /// i64 `[rows]`, on the model's device, of hidden states `[rows, hidden]`.
    fn most_likely(&self, hidden_rm: &Tensor) -> Tensor {
        self.logits(hidden_rm).argmax(-1, false)
    }
}
