//! The cost of the `eval` stage: every task that pruned caches are asked, at most.

use pkv_core::{LayerSplit, ModelShape};

use super::cost::{Decode, MapperCost, Repeat, decode, prefill, scoring};
use super::split::{TargetMemory, fullest};
use super::stages::{Reading, TEMPLATE_TOKENS};
use super::{Machine, StagePlan, Work, element_bytes, parameters};
use crate::{BenchmarkSection, Recipe};

/// Memory limit of the largest intermediates of a forward over many masks, on a CPU and on a GPU:
/// what `eval` limits itself to.
const FORWARD_BYTES: [u64; 2] = [256 << 20, 4 << 30];
/// Memory limit of copies of pruned caches on a CPU; on a GPU it is three eighths of the free memory. The
/// same.
const CPU_COPY_BYTES: u64 = 384 << 20;
/// Tokens of a question where they are not counted.
const QUESTION_TOKENS: usize = 64;

/// Upper bound of one task's work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskWork {
    /// As results have it.
    pub task: String,
    pub contexts: usize,
    pub context_tokens: usize,
    /// Of each context.
    pub questions: usize,
    /// Of each question, the chat template around it included.
    pub question_tokens: usize,
    /// Of each answer, or of the continuation.
    pub answer_tokens: usize,
    pub answers: Answers,
}

/// How answers are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// The full cache's is decoded first, then others that leave it.
    OfFullCache,
    /// Those that are not the right one are decoded.
    Right,
    /// None: the likelihood of given tokens.
    Given,
}

impl TaskWork {
    /// One question about contexts as long as the benchmark's prompts may be.
    pub fn of_prompts(task: String, section: &BenchmarkSection, answer_tokens: usize) -> Self {
        Self {
            task,
            contexts: section.examples,
            context_tokens: section.prompt_tokens.saturating_sub(QUESTION_TOKENS).max(1),
            questions: 1,
            question_tokens: QUESTION_TOKENS + TEMPLATE_TOKENS,
            answer_tokens: match section.answer_tokens {
                0 => answer_tokens,
                most => answer_tokens.min(most),
            },
            answers: Answers::OfFullCache,
        }
    }

    fn forwards(&self) -> usize {
        match self.answers {
            Answers::OfFullCache => 1 + 2 * self.answer_tokens,
            Answers::Right => 1 + self.answer_tokens,
            Answers::Given => 1,
        }
    }
}

/// Copies of the cache that are asked: all of them, and how much of the context they keep together.
struct Copies {
    masks: usize,
    kept: f64,
    largest: f64,
}

impl Copies {
    fn of(recipe: &Recipe) -> Self {
        let section = &recipe.eval;
        let each = section.methods.len() * section.answer_policies.len();
        let kept: f64 = section.answer_ratios.iter().sum();
        let largest = section.answer_ratios.iter().copied().fold(0.0, f64::max);
        Self { masks: each * section.answer_ratios.len(), kept: each as f64 * kept, largest }
    }

    /// Memory of the copies that are asked at once: all, or as many as there is room for beside the bytes
    /// `taken`, and one at least. Kernels of a GPU read a copy for each question; without them one serves
    /// all.
    fn bytes(&self, work: &TaskWork, cache: u64, own: u64, taken: u64, machine: &Machine) -> u64 {
        let questions = if machine.cpu { 1 } else { work.questions };
        let of = |kept: f64| (kept * cache as f64 * questions as f64) as u64;
        let (all, one) = (of(self.kept) + own, of(self.largest) + own / (self.masks.max(1) as u64));
        let spare = match machine.memory_bytes {
            _ if machine.cpu => CPU_COPY_BYTES,
            Some(memory) => memory.saturating_sub(taken) / 8 * 3,
            None => u64::MAX,
        };
        all.min(spare).max(one)
    }
}

/// Every task of `work`.
pub fn eval(
    recipe: &Recipe,
    machine: &Machine,
    mapper: &MapperCost,
    work: &Work,
    split: Option<&LayerSplit>,
) -> StagePlan {
    let (section, shape) = (&recipe.eval, &recipe.target.shape);
    let width = element_bytes(recipe.target.dtype, machine);
    let weights = parameters(&recipe.target) * width;
    let copies = Copies::of(recipe);
    let mut stage = StagePlan::nothing("eval");
    let by = Repeat::new(&recipe.label, TEMPLATE_TOKENS, work.scorer);
    for work in &work.tasks {
        let (n, context) = (work.contexts as f64, work.context_tokens);
        let rows = (copies.masks + 1) * work.questions;
        let new_tokens = work.question_tokens + work.answer_tokens;
        let asked = Decode { rows, new_tokens, context };
        let oracle = prefill(shape, context) + scoring(shape, context, &by);
        let reading: f64 = Reading::all(recipe).map(|(_, r)| r.flops(recipe, context)).sum();
        stage.examples += work.contexts as u64;
        stage.tokens += (work.contexts * context) as u64;
        stage.flops += n * (oracle + reading + mapper.forward_flops(context) + decode(shape, &asked));
        let cache = (context * shape.kv_elements_per_token()) as u64 * width;
        let read = (copies.kept + 1.0) * work.questions as f64 * cache as f64;
        stage.moved_bytes += n * work.forwards() as f64 * (weights as f64 + read);
        let own = (rows * new_tokens * shape.kv_elements_per_token()) as u64 * width;
        let scores = (section.methods.len() * context * shape.total_kv_heads() * 4) as u64;
        let taken = weights + cache + scores;
        let forward = forward_bytes(shape, &asked, machine);
        let copied = copies.bytes(work, cache, own, taken, machine);
        let peak = match split {
            // Copies are where the layers are, scores on the last device.
            Some(split) => {
                let memory = TargetMemory::at_rest(*shape, width, context);
                let share = copied / split.ranges().len() as u64;
                fullest(&memory.working(forward + share).beside(scores).devices(split, None))
            }
            None => taken + copied + forward,
        };
        stage.peak_bytes = stage.peak_bytes.max(peak);
    }
    stage.timed(machine, machine.efficiency.answer)
}

/// Activations of a layer, or attention's weights, within the limit.
fn forward_bytes(shape: &ModelShape, asked: &Decode, machine: &Machine) -> u64 {
    let activations = asked.new_tokens * (3 * shape.intermediate + 6 * shape.hidden);
    let attention = shape.query_heads * asked.context;
    let bytes = 4 * (asked.rows * activations.max(attention)) as u64;
    bytes.min(FORWARD_BYTES[usize::from(!machine.cpu)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::plan::tests::recipe;

    fn work(context_tokens: usize, questions: usize, answers: Answers) -> TaskWork {
        let of = |recipe: &Recipe| TaskWork::of_prompts("ruler.vt".to_owned(), &recipe.eval.benchmark, 30);
        TaskWork { context_tokens, questions, answers, ..of(&recipe(&["eval.benchmark.examples=7"])) }
    }

    fn eval_stage(tasks: &[TaskWork], machine: Machine) -> StagePlan {
        Plan::new(&recipe(&[]), machine, &Work { tasks: tasks.to_vec(), ..Work::default() })
            .stage("eval")
            .unwrap()
            .clone()
    }

    #[test]
    fn tasks_add_up_and_the_largest_sets_the_memory() {
        let gpu = || Machine { memory_bytes: None, ..Machine::h200() };
        let (short, long) = (work(4096, 1, Answers::Right), work(16_384, 1, Answers::OfFullCache));
        let [a, b] = [&short, &long].map(|w| eval_stage(std::slice::from_ref(w), gpu()));
        let both = eval_stage(&[short, long], gpu());
        assert_eq!((both.examples, both.tokens), (14, 7 * (4096 + 16_384)));
        assert!((both.flops / (a.flops + b.flops) - 1.0).abs() < 1e-12);
        assert!((both.moved_bytes / (a.moved_bytes + b.moved_bytes) - 1.0).abs() < 1e-12);
        assert_eq!(both.peak_bytes, b.peak_bytes.max(a.peak_bytes));
        let given = eval_stage(&[work(4096, 1, Answers::Given)], gpu());
        assert!(given.moved_bytes < a.moved_bytes && given.flops == a.flops, "nothing is decoded");
    }

    #[test]
    fn copies_of_pruned_caches_take_what_they_keep_and_no_more_than_there_is() {
        let peak = |questions, machine: &Machine| {
            eval_stage(&[work(16_384, questions, Answers::Right)], machine.clone()).peak_bytes as f64
        };
        let section = recipe(&[]).eval;
        let each = section.methods.len() * section.answer_policies.len();
        let kept: f64 = section.answer_ratios.iter().sum();
        // 131,072 bytes of cache a token, 64 + 48 + 30 tokens of each row's own.
        let rows = (each * section.answer_ratios.len() + 1) as f64;
        let copies = each as f64 * kept * 16_384.0 * 131_072.0 + rows * 142.0 * 131_072.0;
        let much = Machine { memory_bytes: None, ..Machine::h200() };
        let more = peak(2, &much) - peak(1, &much);
        assert!((more / copies - 1.0).abs() < 0.01, "{more} and {copies}");
        // A machine's memory bounds what is asked at once; without kernels one copy serves all questions.
        let h200 = Machine::h200();
        assert!(peak(50, &much) > 141e9 && peak(50, &h200) < 141e9, "{}", peak(50, &h200));
        let (one, two) = (peak(1, &Machine::cpu(2)), peak(2, &Machine::cpu(2)));
        assert!(two - one < 0.01 * one, "{one} and {two}");
    }
}
