//! Attention kernels of CUDA in bf16 and f16: flash attention and cuDNN, each for what it is faster at.

use anyhow::Result;
use tch::Tensor;

use super::{Attention, Part, Rectangle, Segments};
use crate::flash::{Attended, Mask, Softmax, cudnn, flash, flash_segments};

/// A sequence from its first token whose log-sum-exp is not needed: libtorch picks the kernel.
pub fn whole(q_sqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, scale: f64) -> Tensor {
    let [q, k, v] = [&q_sqd.transpose(0, 1), k_hkd, v_hkd].map(|x| x.unsqueeze(0));
    let shared = q.size()[1] > k.size()[1];
    Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, scale, shared)
        .squeeze_dim(0)
        .transpose(0, 1)
}

/// New tokens after `start` cached ones; shapes as [`super::attend`].
pub fn causal(
    q_sqd: &Tensor,
    k_hkd: &Tensor,
    v_hkd: &Tensor,
    start: i64,
    attention: &Attention,
) -> Result<Part> {
    let s = q_sqd.size()[0];
    if s == 1 {
        // A plan of cuDNN's for every length of the cache would take far longer than the kernel.
        return flash_over(q_sqd, k_hkd, v_hkd, attention.softmax(Mask::All));
    }
    if start == 0 {
        return square(q_sqd, k_hkd, v_hkd, attention);
    }
    let Some((rows, keys)) = attention.policy.cudnn_share(s, start) else {
        return flash_over(q_sqd, k_hkd, v_hkd, attention.softmax(Mask::Causal));
    };
    // The first rows: cuDNN over the first keys, and what follows those up to the rows themselves.
    let q_head = q_sqd.narrow(0, 0, rows);
    let behind = |x: &Tensor| x.narrow(1, keys, start + rows - keys);
    let mut part = if keys == start {
        square(&q_head, &behind(k_hkd), &behind(v_hkd), attention)?
    } else {
        flash_over(&q_head, &behind(k_hkd), &behind(v_hkd), attention.softmax(Mask::Causal))?
    };
    part.add(
        0,
        &cudnn_over(&q_head, &k_hkd.narrow(1, 0, keys), &v_hkd.narrow(1, 0, keys), false, attention.scale)?,
    )?;
    if rows == s {
        return Ok(part);
    }
    // The last rows see everything up to the end.
    let tail = flash_over(&q_sqd.narrow(0, rows, s - rows), k_hkd, v_hkd, attention.softmax(Mask::Causal))?;
    Ok(Part {
        out_rqd: Tensor::cat(&[part.out_rqd, tail.out_rqd], 0),
        lse_qr: Tensor::cat(&[part.lse_qr, tail.lse_qr], 1),
    })
}

/// Each segment over itself; shapes as [`super::attend_segments`].
pub fn squares(
    q_rqd: &Tensor,
    k_rhd: &Tensor,
    v_rhd: &Tensor,
    segments: &Segments,
    attention: &Attention,
) -> Result<Part> {
    let starts = [&segments.starts; 2];
    let attended =
        flash_segments(q_rqd, k_rhd, v_rhd, starts, [segments.longest; 2], attention.softmax(Mask::Causal))?;
    Ok(Part { out_rqd: attended.out, lse_qr: attended.lse })
}

/// All rows over all keys; shapes as [`super::add_attention`].
pub fn add_rectangle(
    part: &mut Part,
    q_rqd: &Tensor,
    k_hkd: &Tensor,
    v_hkd: &Tensor,
    attention: &Attention,
) -> Result<()> {
    let (r, k) = (q_rqd.size()[0], k_hkd.size()[1]);
    let Some((rows, keys)) = attention.policy.cudnn_share(r, k) else {
        return part.add(0, &flash_over(q_rqd, k_hkd, v_hkd, attention.softmax(Mask::All))?);
    };
    let q_head = q_rqd.narrow(0, 0, rows);
    part.add(
        0,
        &cudnn_over(&q_head, &k_hkd.narrow(1, 0, keys), &v_hkd.narrow(1, 0, keys), false, attention.scale)?,
    )?;
    if keys < k {
        let rest = |x: &Tensor| x.narrow(1, keys, k - keys);
        part.add(0, &flash_over(&q_head, &rest(k_hkd), &rest(v_hkd), attention.softmax(Mask::All))?)?;
    }
    if rows < r {
        part.add(
            rows,
            &flash_over(&q_rqd.narrow(0, rows, r - rows), k_hkd, v_hkd, attention.softmax(Mask::All))?,
        )?;
    }
    Ok(())
}

/// As many keys as rows, causal.
fn square(q_sqd: &Tensor, k_hsd: &Tensor, v_hsd: &Tensor, attention: &Attention) -> Result<Part> {
    match attention.policy.rectangle {
        Rectangle::Flash => flash_over(q_sqd, k_hsd, v_hsd, attention.softmax(Mask::Causal)),
        Rectangle::Cudnn => cudnn_over(q_sqd, k_hsd, v_hsd, true, attention.scale),
    }
}

fn flash_over(q_sqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, softmax: Softmax) -> Result<Part> {
    let token_major = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
    let attended = flash(&q_sqd.unsqueeze(0), &token_major(k_hkd), &token_major(v_hkd), softmax)?;
    Ok(of_one(&attended))
}

/// cuDNN, or flash where cuDNN has no plan. Causal only for as many keys as rows.
fn cudnn_over(q_sqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, causal: bool, scale: f64) -> Result<Part> {
    let [q, k, v] = [&q_sqd.transpose(0, 1), k_hkd, v_hkd].map(|x| x.unsqueeze(0));
    match cudnn(&q, &k, &v, causal, scale) {
        Ok(Attended { out, lse }) => Ok(of_one(&Attended { out: out.transpose(1, 2), lse })),
        Err(error) => {
            tracing::debug!(q = ?q.size(), k = ?k.size(), "flash in place of cuDNN: {error:#}");
            let mask = if causal { Mask::Causal } else { Mask::All };
            flash_over(q_sqd, k_hkd, v_hkd, Softmax { mask, scale })
        }
    }
}

/// Of a kernel that works on a batch of one, `[1, s, q, d]`.
fn of_one(attended: &Attended) -> Part {
    Part { out_rqd: attended.out.squeeze_dim(0), lse_qr: attended.lse.squeeze_dim(0) }
}
