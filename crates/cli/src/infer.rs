//! `infer`: the request from the arguments, the events as output, the exit code from the summary.

mod output;

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use pkv_checkpoint::Export;
use pkv_core::{FailureKind, RetentionRatio, Stop, hinted};
use pkv_gpu::next_gpu;
use pkv_infer::{
    Budget, ContextFile, Opened, RegimeName, Request, Summary, Trace, is_stdin, is_typed, read_context,
    read_questions, write_traces,
};
use pkv_run::mapper_source::export_folder;
use pkv_run::session::{Devices, choose_devices};
use tch::Device;

use self::output::Output;
use crate::args::{Cli, FELL_BACK, InferArgs};
use crate::terminal::Bar;

/// Read, prune, answer; the exit code tells a fallback, a refused question and an interruption.
///
/// # Errors
/// The mapper does not fit the pair, an input is no good, or the target fails.
pub fn run(cli: &Cli, args: &InferArgs, stop: &Stop) -> Result<ExitCode> {
    let request = request(args, choose_devices(&cli.device, cli.threads)?)?;
    let regime = request.regime;
    if let Some(folder) = args.trace.as_deref().and_then(Path::parent).filter(|f| *f != Path::new("")) {
        let absent = format!("cannot write the trace: there is no folder `{}`", folder.display());
        ensure!(folder.is_dir(), hinted(absent, "make it first"));
    }
    let export = Export::read(&export_folder(&args.mapper, &Bar::new(), stop)?)?;
    let opened = Opened::new(export, request)?;
    let context = read_context(context_file(args)?, opened.tokenizer(), stop)?;
    opened.check_context(context.len())?;
    // Opened now, so that a wrong name is reported before minutes of work.
    let questions = read_questions(&args.questions, args.question_file.as_deref(), stop)?;
    let ready = opened.prefill(&context, stop)?;
    if let Some(path) = &args.trace {
        let phases = ready.prefilled.timeline.phases();
        write_traces(path, &[Trace { name: regime.to_string(), phases }])?;
    }
    let typed = args.questions.is_empty() && args.question_file.as_deref().is_some_and(is_typed);
    let output = Output {
        json: cli.json,
        many: args.question_file.is_some() || args.questions.len() > 1,
        compares: args.compare_full,
        prompts: typed && !cli.json && io::stdout().is_terminal(),
    };
    output.pruned(&ready.prefilled, context.len())?;
    let summary = ready.answer_all(questions, stop, &mut |event| output.event(&event))?;
    output.summary(&summary)?;
    Ok(ExitCode::from(exit_code(&summary)))
}

const fn exit_code(summary: &Summary) -> u8 {
    if summary.interrupted {
        FailureKind::Interrupted.exit_code()
    } else if summary.fallback.is_some() {
        FELL_BACK
    } else if summary.refused > 0 {
        FailureKind::Input.exit_code()
    } else {
        0
    }
}

fn request(args: &InferArgs, devices: Devices) -> Result<Request> {
    let may_spread = matches!(devices, Devices::From(_));
    let target_devices = devices.list();
    let device = target_devices.last().copied().unwrap_or(Device::Cpu);
    let proxy_device = match args.proxy_device {
        Some(choice) => pkv_gpu::device(choice)?,
        None if args.regime == RegimeName::Dual => next_gpu(device).unwrap_or(device),
        None => device,
    };
    Ok(Request {
        mapper: args.mapper.display().to_string(),
        target: args.target.clone(),
        proxy: args.proxy.clone(),
        budget: budget(args)?,
        policy: args.policy,
        keep_recent: args.keep_recent,
        regime: args.regime,
        device,
        target_devices,
        may_spread,
        proxy_device,
        overlap: args.overlap,
        dtype: args.dtype,
        special_tokens_as_text: args.special_tokens_as_text,
        chunk_tokens: args.chunk_tokens,
        window_tokens: args.window_tokens,
        max_new_tokens: args.max_new_tokens,
        compare_full: args.compare_full,
    })
}

fn budget(args: &InferArgs) -> Result<Budget> {
    Ok(match args.budget {
        Some(0) => bail!(hinted("`--budget` is 0", "keep 1 token or more per KV head")),
        Some(tokens) => Budget::Tokens(tokens),
        None => Budget::Ratio(
            RetentionRatio::new(args.retain)
                .map_err(|e| hinted(format!("`--retain {}`: {e}", args.retain), e.hint()))?,
        ),
    })
}

fn context_file(args: &InferArgs) -> Result<ContextFile<'_>> {
    let text = args.context.as_deref().map(ContextFile::Text);
    let file = text.or_else(|| args.context_ids.as_deref().map(ContextFile::Ids));
    let file = file.with_context(|| hinted("there is no context", "name a text file with `--context`"))?;
    let (ContextFile::Text(path) | ContextFile::Ids(path)) = file;
    ensure!(
        !is_stdin(path) || !args.question_file.as_deref().is_some_and(is_stdin),
        hinted(
            "both context and questions are to come from stdin",
            "give one of them as a file, or the questions as `--question`"
        )
    );
    Ok(file)
}
