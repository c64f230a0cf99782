//! `infer`: reads a context, prunes the target's cache, and answers questions from it.

mod input;
mod output;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use pkv_checkpoint::{Export, ModelIdentity};
use pkv_core::{Policy, RetentionRatio, Source, hinted};
use pkv_extract::HiddenProjection;
use pkv_hub::Hub;
use pkv_infer::{
    Answer, Budget, Finish, Keep, NoProxy, Parallel, Prefilled, ProxyMapper, ProxyParts, Question,
    QuestionRefused, Regime, RegimeName, Sequential, Side, TargetSide, answer, check_devices, check_fit,
    check_length,
};
use pkv_lm::{LanguageModel, LmConfig, RaggedCache, TextTokenizer};
use pkv_recipe::DtypeName;
use pkv_score::Requests;
use tch::{Device, Kind};

pub use self::output::{Trace, write_traces};

use self::input::Asked;
use self::output::{FullSummary, Output, Summary};
use crate::args::{Cli, DtypeArg, InferArgs, RegimeArg};
use crate::mapper_source::export_folder;
use crate::render::{FELL_BACK, INTERRUPTED, REPAIRABLE};
use crate::session::{choose_device, device_name, kind_on, next_gpu};
use crate::terminal::Bar;
use pkv_core::Interrupted;

/// A model of the pair on disk, weights unread.
struct Found {
    name: String,
    folder: std::path::PathBuf,
    revision: String,
    config: LmConfig,
    tokenizer: TextTokenizer,
}

/// Read, prune, answer; the exit code tells a fallback, a refused question and an interruption.
///
/// # Errors
/// The mapper does not fit the pair, an input is no good, or the target fails.
pub fn run(cli: &Cli, args: &InferArgs, stop: Arc<AtomicBool>) -> Result<ExitCode> {
    let budget = budget(args)?;
    let regime_name = regime_name(args.regime);
    let device = choose_device(cli.device, cli.threads)?;
    let proxy_device = proxy_device(args, regime_name, device)?;
    check_devices(regime_name, device, proxy_device)?;

    let export = Export::read(&export_folder(&args.mapper, &Bar::new(), &stop)?)?;
    let config = export.config();
    let keep =
        Keep { budget, policy: args.policy.policy(), budgets: export.budgets(), recent: args.keep_recent };
    ensure!(
        keep.policy != Policy::PairBudget || keep.budgets.is_some(),
        hinted(
            format!(
                "the mapper `{}` has no head budgets, which policy `pair-budget` needs",
                args.mapper.display()
            ),
            "it was exported before there were budgets: write it again with `proxykv-train export`, or use \
             `--policy pair-uniform`"
        )
    );
    let mut target = find("target", args.target.as_deref(), &config.target)?;
    if args.special_tokens_as_text {
        target.tokenizer.read_special_tokens_as_text();
    }
    let sources = &config.extract.from;
    ensure!(
        args.proxy.is_none() || config.read_proxy().is_some(),
        hinted(
            format!("the mapper `{}` reads the target alone: `--proxy` has no use", args.mapper.display()),
            "leave `--proxy` out"
        )
    );
    let proxy =
        config.read_proxy().map(|made_for| find("proxy", args.proxy.as_deref(), made_for)).transpose()?;
    ensure!(
        proxy.is_some() || regime_name == RegimeName::Sequential,
        hinted(
            format!(
                "the mapper `{}` reads the target alone: the regime `{regime_name}` has nothing to run beside it",
                args.mapper.display()
            ),
            "leave `--regime` out: the features are taken during the target's prefill"
        )
    );
    for difference in check_fit(config, &target.side(), proxy.as_ref().map(Found::side).as_ref())
        .with_context(|| format!("cannot use the mapper `{}`", args.mapper.display()))?
    {
        tracing::warn!("{difference}");
    }
    let context = input::context(args, &target.tokenizer, &stop)?;
    check_length(target.tokenizer.prefix().len() + context.len(), target.config.max_positions)?;
    // Opened now, so that a wrong name is reported before minutes of work.
    let questions = input::questions(args, &stop)?;
    let trained_tokens = config.trained_tokens.or(config.train.window_tokens);
    if let Some(most) = trained_tokens.filter(|most| context.len() > *most) {
        tracing::warn!(
            "the context has {} tokens, the mapper was trained on contexts of at most {most}: what it keeps of longer ones was \
             not learned",
            context.len()
        );
    }

    let kind = kind_on(device, dtype(args.dtype));
    let target_side = match sources.contains(&Source::Target) {
        true => Some(TargetSide::new(
            export.mapper(device)?,
            &config.extract,
            &config.label,
            Requests::new(&target.tokenizer, &config.label)?,
            HiddenProjection::from_tensors(export.tensors(), device)?,
            args.window_tokens,
        )),
        false => None,
    };
    let source = |proxy: &Found| -> Result<ProxyMapper> {
        let source = ProxyMapper::new(ProxyParts {
            proxy: proxy.load("proxy", proxy_device, kind_on(proxy_device, dtype(args.dtype)))?,
            mapper: if target_side.is_some() { None } else { Some(export.mapper(proxy_device)?) },
            prefix: proxy.tokenizer.prefix().to_vec(),
            requests: Requests::new(&proxy.tokenizer, &config.label)?,
            extract: config.extract.of(Source::Proxy),
            label: config.label.clone(),
            target: config.target.shape,
            window_tokens: args.window_tokens,
        });
        if args.overlap { source.overlapped() } else { Ok(source) }
    };
    let mut regime: Box<dyn Regime> = match (&proxy, regime_name) {
        (None, _) => Box::new(Sequential::new(NoProxy(device))),
        (Some(proxy), RegimeName::Sequential) => Box::new(Sequential::new(source(proxy)?)),
        (Some(proxy), RegimeName::Streams) => Box::new(Parallel::streams(source(proxy)?.sharing_device())?),
        (Some(proxy), RegimeName::Dual) => Box::new(Parallel::dual(source(proxy)?)?),
    };
    let model = target.load("target", device, kind)?;
    let flag = Arc::clone(&stop);
    let read = pkv_infer::Context {
        target: &model,
        prefix: target.tokenizer.prefix(),
        tokens: &context,
        keep,
        chunk_tokens: args.chunk_tokens.unwrap_or(config.label.prefill_chunk_tokens),
        room_tokens: args.max_new_tokens,
        target_side: target_side.as_ref(),
        check_stop: Arc::new(move || match flag.load(Ordering::Relaxed) {
            true => Err(Interrupted.into()),
            false => Ok(()),
        }),
    };
    let prefilled = regime.prefill(&read)?;
    let whole = args.compare_full.then(|| read.whole()).transpose()?;
    drop(read);
    // Proxy and mapper have done their part; their memory is the answers', or another process's.
    drop((regime, target_side));
    if device.is_cuda() || proxy_device.is_cuda() {
        pkv_gpu::empty_cache()?;
    }
    if let Some(path) = &args.trace {
        let trace = Trace { name: regime_name.to_string(), phases: prefilled.timeline.phases() };
        write_traces(path, &[trace])?;
    }
    let summary = Summary {
        regime: regime_name.to_string(),
        device: device_name(device),
        proxy_device: device_name(proxy_device),
        dtype: if kind == Kind::BFloat16 { "bf16" } else { "f32" },
        keep: keep.to_string(),
        context_tokens: context.len(),
        trained_tokens,
        kept: prefilled.kept.clone(),
        prefill_secs: prefilled.timeline.phases().iter().map(|p| p.end_secs).fold(0.0, f64::max),
        waited_secs: prefilled.waited_secs,
        dual_critical_secs: (regime_name == RegimeName::Sequential && prefilled.fallback.is_none())
            .then(|| prefilled.timeline.dual_critical_secs()),
        phases: prefilled.timeline.totals(),
        full: None,
        questions: 0,
        refused: 0,
        answer_tokens: 0,
        decode_tokens_per_s: None,
        fallback: prefilled.fallback.as_ref().map(|e| format!("{e:#}")),
        interrupted: false,
    };
    let output = Output {
        json: cli.json,
        many: args.question_file.is_some() || args.questions.len() > 1,
        compares: args.compare_full,
    };
    output.pruned(&prefilled, context.len())?;
    answer_all(args, &model, &target.tokenizer, prefilled, whole, questions, &stop, &output, summary)
}

/// Every question from the same cache, then the summary.
#[expect(clippy::too_many_arguments, reason = "the parts of one command, used here alone")]
fn answer_all(
    args: &InferArgs,
    model: &LanguageModel,
    tokenizer: &TextTokenizer,
    mut prefilled: Prefilled,
    mut whole: Option<RaggedCache>,
    questions: impl Iterator<Item = Result<Asked>>,
    stop: &AtomicBool,
    output: &Output,
    mut summary: Summary,
) -> Result<ExitCode> {
    let stopped = || stop.load(Ordering::Relaxed);
    let (mut decode_tokens, mut decode_secs) = (0, 0.0);
    let mut full = whole.as_ref().map(|cache| FullSummary::of(cache.bytes()));
    for asked in questions {
        let text = match asked? {
            Asked::Question(text) => text,
            Asked::Malformed { line, error } => {
                summary.refused += 1;
                output.malformed(line, &error)?;
                continue;
            }
        };
        let index = summary.questions;
        output.asked(&text)?;
        output.whose_answer("pruned")?;
        let emit = &mut |piece: &str| output.piece(index, piece);
        summary.questions += 1;
        let answered = Question::new(&text, tokenizer, args.max_new_tokens)
            .and_then(|q| answer(model, tokenizer, &mut prefilled.cache, &q, &stopped, emit));
        match answered {
            Ok(a) => {
                output.answered(index, &text, &a)?;
                summary.answer_tokens += a.answer_tokens;
                decode_tokens += steps(&a);
                decode_secs += a.decode_secs;
                if let (Some(cache), Some(full)) = (&mut whole, &mut full) {
                    output.whose_answer("full")?;
                    let emit = &mut |piece: &str| output.full_piece(piece);
                    let other = Question::new(&text, tokenizer, args.max_new_tokens)
                        .and_then(|q| answer(model, tokenizer, cache, &q, &stopped, emit))?;
                    full.add(&a, &other, steps(&other));
                    output.full_answered(index, &text, &a, &other)?;
                }
                if a.finish == Finish::Interrupted {
                    break;
                }
            }
            // The other questions are none the worse for one that is too long.
            Err(e) if e.downcast_ref::<QuestionRefused>().is_some() => {
                summary.refused += 1;
                output.refused(index, &text, &e)?;
            }
            Err(e) => return Err(e),
        }
    }
    summary.interrupted = stopped();
    summary.full = full;
    summary.decode_tokens_per_s = (decode_secs > 0.0).then(|| decode_tokens as f64 / decode_secs);
    output.summary(&summary)?;
    Ok(if summary.interrupted {
        ExitCode::from(INTERRUPTED)
    } else if summary.fallback.is_some() {
        ExitCode::from(FELL_BACK)
    } else if summary.refused > 0 {
        ExitCode::from(REPAIRABLE)
    } else {
        ExitCode::SUCCESS
    })
}

/// Forwards between an answer's first and last prediction.
fn steps(a: &Answer) -> usize {
    match a.finish {
        // The stop token was predicted too.
        Finish::Stop => a.answer_tokens,
        _ => a.answer_tokens.saturating_sub(1),
    }
}

fn budget(args: &InferArgs) -> Result<Budget> {
    Ok(match args.budget {
        Some(0) => return Err(hinted("`--budget` is 0", "keep 1 token or more per KV head").into()),
        Some(tokens) => Budget::Tokens(tokens),
        None => Budget::Ratio(
            RetentionRatio::new(args.retain)
                .map_err(|e| hinted(format!("`--retain {}`: {e}", args.retain), e.hint()))?,
        ),
    })
}

const fn regime_name(regime: RegimeArg) -> RegimeName {
    match regime {
        RegimeArg::Sequential => RegimeName::Sequential,
        RegimeArg::Streams => RegimeName::Streams,
        RegimeArg::Dual => RegimeName::Dual,
    }
}

const fn dtype(dtype: DtypeArg) -> DtypeName {
    match dtype {
        DtypeArg::Auto => DtypeName::Auto,
        DtypeArg::F32 => DtypeName::F32,
        DtypeArg::Bf16 => DtypeName::Bf16,
    }
}

/// Device of proxy and mapper: with `dual` the next GPU, if there is one.
fn proxy_device(args: &InferArgs, regime: RegimeName, target: Device) -> Result<Device> {
    match args.proxy_device {
        Some(choice) => pkv_gpu::device(choice),
        None if regime == RegimeName::Dual => Ok(next_gpu(target).unwrap_or(target)),
        None => Ok(target),
    }
}

/// The model that was named, or the one that the mapper was made for.
fn find(role: &str, named: Option<&str>, made_for: &ModelIdentity) -> Result<Found> {
    let (name, revision) = match named {
        Some(name) => (name, "main"),
        None => (made_for.model.as_str(), made_for.revision.as_str()),
    };
    let context = || {
        hinted(
            format!("cannot open the {role} `{name}`"),
            format!("name its folder or its hub name with `--{role}`"),
        )
    };
    let resolved = Hub::from_env().model(name, revision, &[Path::new("")]).with_context(context)?;
    Ok(Found {
        name: name.to_owned(),
        config: LmConfig::from_folder(&resolved.folder).with_context(context)?,
        tokenizer: TextTokenizer::open(&resolved.folder).with_context(context)?,
        folder: resolved.folder,
        revision: resolved.revision,
    })
}

impl Found {
    fn side(&self) -> Side<'_> {
        Side {
            name: &self.name,
            revision: &self.revision,
            shape: self.config.shape,
            tokenizer: &self.tokenizer,
        }
    }

    fn load(&self, role: &str, device: Device, kind: Kind) -> Result<LanguageModel> {
        tracing::info!("loading the {role} `{}` ({})", self.name, self.config.shape);
        LanguageModel::load(&self.folder, device, kind)
            .with_context(|| format!("cannot load the {role} `{}`", self.name))
    }
}
