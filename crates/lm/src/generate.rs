//! Greedy answers, for one sequence and for many branches of one context.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use crate::branches::Branches;
use crate::cache::KvCache;
use crate::model::LanguageModel;
use crate::tap::NoTap;

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
    /// Rows may differ in length. Each answer ends as in [`LanguageModel::generate`]; the branches
    /// then hold more tokens in rows that ended early than their answers have.
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
        let mut answers = vec![Vec::new(); rows];
        if max_new == 0 {
            return Ok(answers);
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
        let mut hidden_rm = hidden_rsm.gather(1, &index, false).squeeze_dim(1);

        let mut open = vec![true; rows];
        loop {
            let id_r = self.logits(&hidden_rm).argmax(-1, false);
            let ids = Vec::<i64>::try_from(&id_r.to_kind(Kind::Int64))?;
            for ((answer, open), id) in answers.iter_mut().zip(&mut open).zip(ids) {
                if *open && stop.contains(&(id as u32)) {
                    *open = false;
                } else if *open {
                    answer.push(id as u32);
                    *open = answer.len() < max_new;
                }
            }
            if !open.contains(&true) {
                return Ok(answers);
            }
            hidden_rm = self.forward_branches(&id_r.unsqueeze(1), branches)?.squeeze_dim(1);
        }
    }
}
