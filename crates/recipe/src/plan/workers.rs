//! A stage by N workers, simulated: time, price, and what they ask of the file system.
//!
//! As the program does it: piece i belongs to worker i mod N; a worker that is pre-empted loses the context
//! in hand, waits in the queue and goes on; one whose pieces are done lists the names of the pieces' folder,
//! and the one that finds all of them reads every marker and writes the index. The tables of docs/scale.md
//! come from here.

use std::str::FromStr;

use pkv_core::Seed;
use serde::{Deserialize, Serialize};

use super::table::{aligned, dollars};
use super::{Plan, human_bytes, human_count, human_secs};

/// Stages that workers share, and whether their pieces are shards; those of `eval` are single contexts.
const SHARED: [(&str, bool); 3] = [("label", true), ("extract", true), ("eval", false)];

/// Looks for the marker of each of its pieces: when a worker begins, and when it claims one.
const LOOKS: u64 = 4;
/// Of so many pieces the names are listed by every worker that ends; of more, by those that find no task's
/// last piece absent.
const LISTED: u64 = 100;
/// Of a piece in the index, as JSON.
const ENTRY_BYTES: u64 = 150;

/// A cluster's habits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Seconds until a worker has loaded its model.
    pub start: f64,
    /// Seconds in the queue: at most at first, always after a pre-emption.
    pub queue: f64,
    /// Pre-emptions of one worker in an hour.
    pub preemptions: f64,
    /// Deviation of the logarithm of a context's time, and of a worker's speed.
    pub spread: f64,
    pub node_spread: f64,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { start: 90.0, queue: 120.0, preemptions: 0.0, spread: 0.3, node_spread: 0.05 }
    }
}

impl FromStr for Cluster {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut cluster = Self::default();
        for part in text.split(',').map(str::trim) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let field = match key.trim() {
                "start" => &mut cluster.start,
                "queue" => &mut cluster.queue,
                "preemptions" => &mut cluster.preemptions,
                "spread" => &mut cluster.spread,
                "node_spread" => &mut cluster.node_spread,
                _ => {
                    return Err(format!("`{key}` is none of start, queue, preemptions, spread, node_spread"));
                }
            };
            let number = value.trim().parse().ok().filter(|v: &f64| v.is_finite() && *v >= 0.0);
            *field =
                number.ok_or_else(|| format!("`{part}` has no number of 0 or more, such as `{key}=60`"))?;
        }
        Ok(cluster)
    }
}

/// A stage that workers share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedStage {
    pub contexts: u64,
    /// Seconds of a context on one worker.
    pub secs: f64,
    /// Contexts of a piece.
    pub piece: u64,
    pub cluster: Cluster,
}

/// A stage by so many workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkersPlan {
    pub stage: String,
    pub contexts: u64,
    pub secs_per_context: f64,
    pub piece: u64,
    pub workers: u64,
    pub pieces: u64,
    /// From the submission to the end.
    pub secs: f64,
    /// Of all workers that are there; waiting in the queue costs nothing.
    pub worker_hours: f64,
    #[serde(default)]
    pub usd: Option<f64>,
    /// Of the workers' time from the submission to the end.
    pub idle_share: f64,
    pub preempted: u64,
    /// Of contexts that were begun and lost.
    pub lost_hours: f64,
    /// Markers that are looked for or read, by all workers together.
    pub markers: u64,
    /// Names that are listed in the pieces' folder, by all workers together.
    pub names: u64,
    pub index_bytes: u64,
}

impl Plan {
    /// This plan with its stages by each of `workers` on `cluster`; pieces of `shard` contexts.
    #[must_use]
    pub fn with_workers(mut self, workers: &[u64], shard: u64, cluster: Cluster) -> Self {
        for (name, in_shards) in SHARED {
            let Some(stage) = self.stage(name) else { continue };
            let (contexts, Some(secs)) = (stage.examples, stage.secs) else { continue };
            if contexts == 0 || secs <= 0.0 {
                continue;
            }
            let piece = if in_shards { shard.max(1) } else { 1 };
            let shared = SharedStage { contexts, secs: secs / contexts as f64, piece, cluster };
            for &n in workers {
                let mut made = shared.by(name, n.max(1), self.machine.usd_per_hour);
                if !in_shards {
                    made.index_bytes = 0;
                }
                self.workers.push(made);
            }
        }
        self
    }

    /// The stages by workers, as lines of text.
    pub(super) fn workers_table(&self) -> String {
        let mut text = String::new();
        for of_stage in self.workers.chunk_by(|a, b| a.stage == b.stage) {
            let first = &of_stage[0];
            text += &format!(
                "\n{} by workers: {} contexts of {}, {} in a piece\n",
                first.stage,
                human_count(first.contexts),
                human_secs(first.secs_per_context),
                first.piece
            );
            let hours = if self.machine.cpu { "worker-hours" } else { "GPU-hours" };
            let mut rows = vec![vec![
                "workers",
                "pieces",
                "time",
                hours,
                "cost",
                "idle",
                "pre-empted",
                "lost hours",
                "markers",
                "names listed",
                "index",
            ]];
            let cells: Vec<Vec<String>> = of_stage.iter().map(WorkersPlan::cells).collect();
            rows.extend(cells.iter().map(|row| row.iter().map(String::as_str).collect()));
            let rows: Vec<Vec<String>> =
                rows.iter().map(|row| row.iter().map(|&c| c.to_owned()).collect()).collect();
            text += &aligned(&rows);
        }
        text
    }
}

impl WorkersPlan {
    fn cells(&self) -> Vec<String> {
        vec![
            self.workers.to_string(),
            self.pieces.to_string(),
            human_secs(self.secs),
            format!("{:.1}", self.worker_hours),
            self.usd.map_or_else(|| "-".to_owned(), dollars),
            format!("{:.0}%", 100.0 * self.idle_share),
            self.preempted.to_string(),
            format!("{:.1}", self.lost_hours),
            human_count(self.markers),
            human_count(self.names),
            human_bytes(self.index_bytes),
        ]
    }
}

impl SharedStage {
    /// The stage by `workers`, each at `usd_per_hour`.
    pub fn by(&self, stage: &str, workers: u64, usd_per_hour: Option<f64>) -> WorkersPlan {
        let Cluster { start, queue, preemptions, spread, node_spread } = self.cluster;
        let mut draw = Draw { next: 0 };
        let pieces = self.contexts.div_ceil(self.piece);
        let speeds: Vec<f64> = (0..workers).map(|_| draw.around_one(node_spread)).collect();
        // Of these workers, and not of others: their mean is that of the stage.
        let mean = speeds.iter().sum::<f64>() / workers as f64;
        let (mut busy, mut lost, mut preempted) = (0.0, 0.0, 0);
        let (mut ends, mut ended) = (Vec::new(), Vec::new());
        for (worker, speed) in (0..workers).zip(speeds.iter().map(|speed| speed / mean)) {
            let mut now = queue * draw.uniform() + start;
            busy += start;
            for piece in (worker..pieces).step_by(workers as usize) {
                let rows = self.piece.min(self.contexts - piece * self.piece);
                let mut length: f64 = (0..rows).map(|_| self.secs * speed * draw.around_one(spread)).sum();
                loop {
                    let until = match preemptions > 0.0 {
                        true => -3600.0 / preemptions * draw.above_zero().ln(),
                        false => f64::INFINITY,
                    };
                    if until >= length {
                        break;
                    }
                    preempted += 1;
                    // Its rows are kept but for the one in hand.
                    let in_hand = (self.secs * speed * draw.uniform()).min(until);
                    lost += in_hand;
                    length -= until - in_hand;
                    now += until + queue + start;
                    busy += until + start;
                }
                now += length;
                busy += length;
                ended.push(now);
            }
            ends.push(now);
        }
        ended.sort_by(f64::total_cmp);
        let (mut looks, mut names, mut readers) = (0, 0, 0);
        for (worker, &end) in ends.iter().enumerate() {
            // The last piece of each other task, from the right, until one is absent.
            let others = ends[worker + 1..].iter().chain(&ends[..worker]).take(pieces.min(workers) as usize);
            let there = others.take_while(|at| **at <= end).count() as u64;
            let all = there + 1 >= pieces.min(workers);
            looks += if pieces > LISTED { there + u64::from(!all) } else { 0 };
            readers += u64::from(all);
            if all || pieces <= LISTED {
                // A piece that has ended has a marker and a lock, one at work a lock.
                let done = ended.partition_point(|at| *at <= end) as u64;
                names += (2 * done + workers).min(2 * pieces) + 1;
            }
        }
        let last = ends.iter().copied().fold(0.0, f64::max);
        let worker_hours = busy / 3600.0;
        WorkersPlan {
            stage: stage.to_owned(),
            contexts: self.contexts,
            secs_per_context: self.secs,
            piece: self.piece,
            workers,
            pieces,
            secs: last,
            worker_hours,
            usd: usd_per_hour.map(|usd| usd * worker_hours),
            idle_share: 1.0 - self.contexts as f64 * self.secs / (workers as f64 * last),
            preempted,
            lost_hours: lost / 3600.0,
            markers: LOOKS * pieces + looks + readers.max(1) * pieces,
            names,
            index_bytes: pieces * ENTRY_BYTES,
        }
    }
}

/// Random numbers, the same in every plan.
struct Draw {
    next: u64,
}

impl Draw {
    /// In [0, 1).
    fn uniform(&mut self) -> f64 {
        self.next += 1;
        (Seed(1).derive("plan.workers", self.next) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// In (0, 1].
    fn above_zero(&mut self) -> f64 {
        1.0 - self.uniform()
    }

    /// Log-normal with mean 1.
    fn around_one(&mut self, spread: f64) -> f64 {
        let normal = (-2.0 * self.above_zero().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos();
        (spread * normal - spread * spread / 2.0).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 50,000 contexts in 170 hours of one GPU.
    fn large(piece: u64, preemptions: f64) -> SharedStage {
        let cluster = Cluster { preemptions, ..Cluster::default() };
        SharedStage { contexts: 50_000, secs: 12.24, piece, cluster }
    }

    fn thousands(n: u64) -> String {
        let digits = n.to_string();
        let parts: Vec<&str> =
            digits.as_bytes().rchunks(3).rev().map(|c| std::str::from_utf8(c).unwrap()).collect();
        parts.join(",")
    }

    #[test]
    fn the_tables_of_the_document_are_these() {
        let mut lines = Vec::new();
        for (workers, piece) in [(1, 64), (10, 64), (100, 64), (300, 64), (1000, 64), (1000, 16), (1000, 4)] {
            let p = large(piece, 0.0).by("label", workers, None);
            lines.push(format!(
                "| {workers} | {piece} | {} | {:.2} | {:.0} | {:.0}% | {} | {} |",
                thousands(p.pieces),
                p.secs / 3600.0,
                p.worker_hours,
                100.0 * (1.0 - p.idle_share),
                thousands(p.markers),
                thousands(p.names)
            ));
        }
        for preemptions in [0.0, 0.1, 1.0, 4.0] {
            let p = large(16, preemptions).by("label", 300, None);
            lines.push(format!(
                "| {preemptions} | {:.2} | {:.0} | {} | {:.1} |",
                p.secs / 3600.0,
                p.worker_hours,
                p.preempted,
                p.lost_hours
            ));
        }
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/scale.md");
        let document = std::fs::read_to_string(path).unwrap();
        let absent: Vec<&String> = lines.iter().filter(|line| !document.contains(*line)).collect();
        assert!(absent.is_empty(), "docs/scale.md lacks\n{}", lines.join("\n"));
    }

    #[test]
    fn more_workers_take_less_time_and_no_less_money() {
        let by = |n| large(64, 0.0).by("label", n, Some(2.0));
        let (one, ten) = (by(1), by(10));
        assert!(one.secs > 9.0 * ten.secs && ten.worker_hours > 169.0 && ten.idle_share < 0.1);
        assert!((one.usd.unwrap() / one.worker_hours - 2.0).abs() < 1e-9);
        assert!((one.worker_hours / 170.0 - 1.0).abs() < 0.05, "{}", one.worker_hours);
        // Workers without pieces cost their start.
        let idle = SharedStage { contexts: 10, ..large(1, 0.0) }.by("eval", 40, None);
        assert!(idle.idle_share > 0.7 && idle.pieces == 10);
        assert_eq!(by(10), ten, "the same in every plan");
    }

    #[test]
    fn a_cluster_is_named_by_its_habits() {
        let cluster: Cluster = "queue=5, preemptions=0.5".parse().unwrap();
        assert_eq!(cluster, Cluster { queue: 5.0, preemptions: 0.5, ..Cluster::default() });
        for (text, part) in [
            ("wait=3", "none of start, queue"),
            ("queue=-1", "no number of 0 or more"),
            ("queue", "no number"),
        ] {
            assert!(text.parse::<Cluster>().unwrap_err().contains(part), "{text}");
        }
    }
}
