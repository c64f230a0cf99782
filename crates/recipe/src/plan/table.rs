//! A plan as text for a terminal.

use std::fmt::{self, Write as _};

use super::{DevicePlan, Machine, Plan, human_bytes, human_count, human_flops, human_secs};

const COLUMNS: [&str; 10] =
    ["stage", "examples", "tokens", "on disk", "compute", "moved", "memory", "fits", "time", "cost"];

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = if self.machine.gpus > 1 { " each" } else { "" };
        let memory = self.machine.memory_bytes.map(|bytes| format!(", {}{each}", human_bytes(bytes)));
        writeln!(f, "plan of `{}` on {}{}", self.name, self.machine.name, memory.unwrap_or_default())?;
        let proxy = self.proxy.as_ref().map(|proxy| ("proxy", proxy));
        for (role, model) in [("target", &self.target)].into_iter().chain(proxy) {
            writeln!(
                f,
                "  {role:<7} {}: at most {} parameters, {} of weights, {} of cache per token",
                model.model,
                human_count(model.parameters),
                human_bytes(model.weight_bytes),
                human_bytes(model.cache_bytes_per_token)
            )?;
        }
        writeln!(
            f,
            "  mapper  {} KV heads to {}: {} parameters, {} per token, {:.2}% of the target's prefill",
            self.mapper.inputs,
            self.mapper.outputs,
            human_count(self.mapper.parameters),
            human_flops(self.mapper.flops_per_token),
            100.0 * self.mapper.share_of_prefill
        )?;
        writeln!(f, "  train   steps: {}", self.train_steps)?;
        writeln!(
            f,
            "  infer   a context of {} tokens: {} in sequence, {} on two streams, {}",
            self.infer.tokens,
            human_bytes(self.infer.sequential_bytes),
            human_bytes(self.infer.streams_bytes),
            human_secs(self.infer.secs)
        )?;
        if let Some(split) = &self.split {
            writeln!(
                f,
                "  split   the target over {} {} in `label`, busy {:.0}% of the time; on one: {}",
                split.devices.len(),
                if self.machine.cpu { "parts" } else { "GPUs" },
                100.0 * split.busy,
                human_bytes(split.one_bytes)
            )?;
            write_devices(f, &split.devices)?;
        }
        if !self.infer.devices.is_empty() {
            writeln!(f, "  split   the target over {} in `infer`", self.infer.devices.len())?;
            write_devices(f, &self.infer.devices)?;
        }
        writeln!(f)?;
        let rows = self.rows();
        // A column of which nothing is known is left out.
        let is_known =
            |c: usize| c == 0 || rows.iter().skip(1).any(|row| !matches!(row[c].as_str(), "" | "-"));
        let known: Vec<usize> = (0..COLUMNS.len()).filter(|c| is_known(*c)).collect();
        let rows: Vec<Vec<String>> =
            rows.iter().map(|row| known.iter().map(|c| row[*c].clone()).collect()).collect();
        f.write_str(&aligned(&rows))?;
        f.write_str(&self.workers_table())?;
        writeln!(f)?;
        writeln!(
            f,
            "Tokens and bytes are upper bounds: documents may be shorter than their window, shards compress.\n\
             Times take {} TFLOP/s and {} GB/s, and {:.0}% / {:.0}% / {:.0}% / {:.0}% of the former in label / extract / train / eval.",
            self.machine.tflops,
            self.machine.copy_gb_per_sec,
            100.0 * self.machine.efficiency.label,
            100.0 * self.machine.efficiency.extract,
            100.0 * self.machine.efficiency.train,
            100.0 * self.machine.efficiency.answer
        )?;
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        if let Some(memory) = self.machine.memory_bytes {
            for stage in self.stages.iter().filter(|s| s.peak_bytes > memory) {
                writeln!(
                    f,
                    "Stage `{}` needs {} of memory, the {} has {}.",
                    stage.stage,
                    human_bytes(stage.peak_bytes),
                    if self.machine.gpus > 1 { "GPU" } else { "machine" },
                    human_bytes(memory)
                )?;
            }
            self.write_advice(f)?;
        }
        Ok(())
    }
}

/// A line for each device.
fn write_devices(f: &mut fmt::Formatter<'_>, devices: &[DevicePlan]) -> fmt::Result {
    for device in devices {
        writeln!(
            f,
            "          layers {} to {}: {} of weights, {} of cache, {} at work: {}{}",
            device.first_layer,
            device.end_layer.saturating_sub(1),
            human_bytes(device.weight_bytes),
            human_bytes(device.cache_bytes),
            human_bytes(device.working_bytes),
            human_bytes(device.peak_bytes),
            match device.fits {
                Some(false) => ", does not fit",
                _ => "",
            }
        )?;
    }
    Ok(())
}

impl Plan {
    /// What several GPUs are for, where no split says it.
    fn write_advice(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { gpus, cpu, .. } = self.machine;
        if cpu || self.split.is_some() {
            return Ok(());
        }
        if gpus > 1 {
            return writeln!(
                f,
                "The target fits one of the {gpus} GPUs. Times are of one: `--devices all` has a worker on each for label, \
                 extract and eval."
            );
        }
        match self.over_more {
            Some(n) => {
                let names: Vec<String> = (0..n).map(|gpu| format!("cuda:{gpu}")).collect();
                writeln!(
                    f,
                    "Over {n} such GPUs the target fits: `--device {}`; `--machine NAME,gpus={n}` plans it.",
                    names.join("+")
                )
            }
            None => Ok(()),
        }
    }

    /// The plan as a table, ending in a line break.
    pub fn table(&self) -> String {
        self.to_string()
    }

    fn rows(&self) -> Vec<[String; COLUMNS.len()]> {
        let mut rows = vec![COLUMNS.map(str::to_owned)];
        let or_dash = |zero: bool, text: String| if zero { "-".to_owned() } else { text };
        for s in &self.stages {
            rows.push([
                s.stage.clone(),
                or_dash(s.examples == 0, human_count(s.examples)),
                or_dash(s.tokens == 0, human_count(s.tokens)),
                or_dash(s.disk_bytes == 0, human_bytes(s.disk_bytes)),
                or_dash(s.flops == 0.0, human_flops(s.flops)),
                or_dash(s.moved_bytes == 0.0, human_bytes(s.moved_bytes as u64)),
                or_dash(s.peak_bytes == 0, human_bytes(s.peak_bytes)),
                verdict(s.fits),
                s.secs.map_or_else(|| "-".to_owned(), human_secs),
                s.usd.map_or_else(|| "-".to_owned(), dollars),
            ]);
        }
        rows.push([
            "run".to_owned(),
            String::new(),
            String::new(),
            human_bytes(self.run_bytes()),
            human_flops(self.stages.iter().map(|s| s.flops).sum()),
            String::new(),
            human_bytes(self.peak_bytes()),
            verdict(self.machine.memory_bytes.map(|memory| self.peak_bytes() <= memory)),
            human_secs(self.secs()),
            self.usd().map_or_else(|| "-".to_owned(), dollars),
        ]);
        rows
    }
}

/// Lines of cells in columns: the first to the left, the others to the right.
pub fn aligned<L: AsRef<[String]>>(lines: &[L]) -> String {
    let mut out = String::new();
    let lines = || lines.iter().map(AsRef::as_ref);
    let columns = lines().map(<[String]>::len).max().unwrap_or(0);
    let width = |c: usize| lines().filter_map(|l| l.get(c)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for line in lines() {
        let mut text = format!("  {:<w$}", line[0], w = widths[0]);
        for (cell, &w) in line.iter().zip(&widths).skip(1) {
            let _ = write!(text, "  {cell:>w$}");
        }
        let _ = writeln!(out, "{}", text.trim_end());
    }
    out
}

fn verdict(fits: Option<bool>) -> String {
    fits.map_or("-", |fits| if fits { "yes" } else { "no" }).to_owned()
}

/// `$0.42`, `$128`.
pub(super) fn dollars(usd: f64) -> String {
    format!("${usd:.*}", if usd < 100.0 { 2 } else { 0 })
}
