//! The report's charts: which numbers each one shows.

use pkv_core::Policy;
use pkv_recipe::MethodName;
use pkv_results::{AnswerResults, HeadRecall, Interval, LabelResults, PerplexityResults};
use serde::Serialize;

use crate::chart::{Axis, HeatMap, LineChart, Marker, Point, Scale, Series, Tone, percent_text};
use crate::method::Methods;
use crate::metrics::Metrics;

const KEPT: &str = "share of KV pairs kept (log scale; fewer to the right)";
/// Training losses swing from batch to batch; a mean over this many log lines on either side is drawn on top.
const SMOOTH_REACH: usize = 4;

/// Share of questions answered, by retention ratio.
pub fn answers(methods: Methods, facts: &AnswerResults, policy: Policy) -> Option<LineChart> {
    let cells = facts.cells.iter().filter(|c| c.policy == policy).map(|c| (c.method, c.ratio, c.score));
    let mut chart =
        by_ratio(methods, cells, "questions answered", Axis::percent("questions answered"), shares)?;
    chart.title = format!("Share of {} questions answered, by share of KV pairs kept", facts.questions);
    chart.reference = Some((facts.full.mean, format!("full cache {}", percent(facts.full.mean))));
    Some(chart)
}

/// Recall of KVzip's kept set, by retention ratio; KVzip's own, which is 1, is left out.
pub fn recall(methods: Methods, labels: &LabelResults, policy: Policy) -> Option<LineChart> {
    let cells = labels
        .cells
        .iter()
        .filter(|c| c.policy == policy && c.method != MethodName::KVZIP)
        .map(|c| (c.method, c.ratio, c.recall));
    let mut chart = by_ratio(methods, cells, "recall", Axis::percent("of KVzip's choice found"), shares)?;
    chart.title = format!("Recall of the KV pairs that KVzip keeps, policy {}", policy.name());
    Some(chart)
}

/// Nats per token lost on the continuation, by retention ratio.
pub fn perplexity(methods: Methods, results: &PerplexityResults, policy: Policy) -> Option<LineChart> {
    let cells = || results.cells.iter().filter(|c| c.policy == policy);
    let low = cells().map(|c| c.excess.low).fold(0.0, f64::min);
    let high = cells().map(|c| c.excess.high).fold(0.0, f64::max);
    let axis = Axis::nice("nats per token above the full cache", low, high, 5);
    let mut chart = by_ratio(methods, cells().map(|c| (c.method, c.ratio, c.excess)), "excess", axis, nats)?;
    chart.title = "Likelihood lost on the document's continuation, by share of KV pairs kept".to_owned();
    Some(chart)
}

fn by_ratio(
    methods: Methods,
    cells: impl Iterator<Item = (MethodName, f64, Interval)>,
    what: &str,
    y: Axis,
    show: fn(Interval) -> String,
) -> Option<LineChart> {
    let cells: Vec<_> = cells.collect();
    let mut chart = by_method(methods, &methods.ordered(cells.iter().map(|c| c.0)), cells, what, y, show);
    chart.series.retain(|s| !s.points.is_empty());
    (!chart.series.is_empty()).then_some(chart)
}

/// A line for each of `lines`, measured or not.
fn by_method(
    methods: Methods,
    lines: &[MethodName],
    mut cells: Vec<(MethodName, f64, Interval)>,
    what: &str,
    y: Axis,
    show: fn(Interval) -> String,
) -> LineChart {
    cells.retain(|(_, _, v)| v.mean.is_finite());
    cells.sort_by(|a, b| b.1.total_cmp(&a.1));
    let ratios: Vec<f64> = cells.iter().map(|c| c.1).collect();
    // The mapper comes first in the registry and is drawn last, on top.
    let series = lines
        .iter()
        .rev()
        .map(|&m| Series {
            label: m.name().to_owned(),
            class: methods.class(m),
            marker: methods.marker(m),
            points: cells
                .iter()
                .filter(|c| c.0 == m)
                .map(|&(_, x, v)| Point {
                    x,
                    y: v.mean,
                    low: v.low,
                    high: v.high,
                    tip: format!("{}, {} kept: {what} {}", m.name(), percent_text(x), show(v)),
                })
                .collect(),
        })
        .collect();
    LineChart { title: String::new(), x: Axis::kept(KEPT, &ratios), y, series, reference: None }
}

/// Small charts side by side, with one legend for all of them.
#[derive(Serialize)]
pub struct Multiples {
    legend: String,
    /// Captions and charts.
    charts: Vec<(String, String)>,
}

/// `charts` with their captions: a line has the same place in each. `None` unless there are several.
pub fn multiples(charts: Vec<(String, LineChart)>) -> Option<Multiples> {
    // Of the chart that has most lines.
    let most = charts.iter().max_by_key(|(_, c)| c.series.iter().filter(|s| !s.points.is_empty()).count())?;
    (charts.len() > 1).then(|| Multiples {
        legend: most.1.legend(),
        charts: charts.iter().map(|(caption, chart)| (caption.clone(), chart.small())).collect(),
    })
}

/// Scores by share kept, a small chart for each task.
pub fn by_task(methods: Methods, tasks: &[(String, &AnswerResults)], policy: Policy) -> Option<Multiples> {
    let cells = |task: &AnswerResults| -> Vec<(MethodName, f64, Interval)> {
        let of = task.cells.iter().filter(|c| c.policy == policy);
        of.map(|c| (c.method, c.ratio, c.score)).collect()
    };
    let lines = methods.ordered(tasks.iter().flat_map(|(_, task)| cells(task)).map(|c| c.0));
    let chart = |(name, task): &(String, &AnswerResults)| {
        let cells = cells(task);
        if cells.is_empty() {
            return None;
        }
        let mut chart = by_method(methods, &lines, cells, "score", Axis::percent("score"), shares);
        chart.title = format!("{name}: score by share of KV pairs kept");
        chart.reference = Some((task.full.mean, format!("full cache {}", percent(task.full.mean))));
        Some((name.clone(), chart))
    };
    multiples(tasks.iter().filter_map(chart).collect())
}

/// The points of one run in [`scatter`]: share kept, x, y.
pub struct Dots {
    pub label: String,
    pub class: String,
    pub marker: Marker,
    pub points: Vec<(f64, f64, f64)>,
}

/// Recall against answers, both as shares; `None` of nothing.
pub fn scatter(runs: &[Dots]) -> Option<LineChart> {
    let axis = |label: &str, values: &mut dyn Iterator<Item = f64>| {
        let ends = (f64::INFINITY, f64::NEG_INFINITY);
        let (low, high) = values.filter(|v| v.is_finite()).fold(ends, |(l, h), v| (l.min(v), h.max(v)));
        low.is_finite().then(|| Axis::nice(label, 100.0 * low, 100.0 * high, 5).of_shares())
    };
    let all = || runs.iter().flat_map(|run| &run.points);
    let series = |run: &Dots| Series {
        label: run.label.clone(),
        class: format!("{} dots", run.class),
        marker: run.marker,
        points: run
            .points
            .iter()
            .map(|&(kept, x, y)| Point {
                x,
                y,
                low: y,
                high: y,
                tip: format!(
                    "{}, {} kept: recall {}, answers {}",
                    run.label,
                    percent_text(kept),
                    percent(x),
                    percent(y)
                ),
            })
            .collect(),
    };
    Some(LineChart {
        title: "Questions answered against recall of KVzip's choice, a point for each share kept".to_owned(),
        x: axis("recall of KVzip's choice, %", &mut all().map(|p| p.1))?,
        y: axis("questions answered, %", &mut all().map(|p| p.2))?,
        series: runs.iter().map(series).collect(),
        reference: None,
    })
}

fn shares(v: Interval) -> String {
    format!("{} (95% interval {} to {})", percent(v.mean), percent(v.low), percent(v.high))
}

fn nats(v: Interval) -> String {
    format!("{:.3} (95% interval {:.3} to {:.3})", v.mean, v.low, v.high)
}

/// `97.1%`; `100%` where the decimal would be idle.
pub fn percent(share: f64) -> String {
    let text = format!("{:.1}", share * 100.0);
    format!("{}%", if text == "100.0" { "100" } else { &text })
}

/// One line of [`layers`].
pub struct LayerLine {
    pub label: String,
    pub class: String,
    pub marker: Marker,
    /// By layer.
    pub shares: Vec<f64>,
}

/// Share of each layer's KV pairs that is kept; `None` of nothing.
pub fn layers(lines: &[LayerLine]) -> Option<LineChart> {
    let highest = lines.iter().flat_map(|l| &l.shares).copied().fold(0.0, f64::max);
    let last = lines.iter().map(|l| l.shares.len()).max()?.checked_sub(1)?;
    let series = |l: &LayerLine| Series {
        label: l.label.clone(),
        class: l.class.clone(),
        marker: l.marker,
        points: (0..l.shares.len())
            .map(|layer| {
                let y = l.shares[layer];
                let tip = format!("{}, layer {layer}: {} kept", l.label, percent(y));
                Point { x: layer as f64, y, low: y, high: y, tip }
            })
            .collect(),
    };
    Some(LineChart {
        title: "Share of each layer's KV pairs that is kept".to_owned(),
        x: Axis {
            label: "layer".to_owned(),
            scale: Scale::Linear { from: 0.0, to: last as f64 },
            ticks: layer_ticks(last),
        },
        y: Axis::nice("kept, %", 0.0, highest * 100.0, 5).of_shares(),
        series: lines.iter().map(series).collect(),
        reference: None,
    })
}

/// Every layer, or every fourth of many.
fn layer_ticks(last: usize) -> Vec<(f64, String)> {
    let step = if last > 16 { 4 } else { 1 };
    (0..=last).step_by(step).map(|l| (l as f64, l.to_string())).collect()
}

/// One line of [`by_run`].
pub struct RunLine<'a> {
    pub label: String,
    pub class: String,
    pub marker: Marker,
    pub ratios: &'a [f64],
    pub values: &'a [Interval],
}

/// Shares by retention ratio, a line for each run; `None` of nothing.
pub fn by_run(lines: &[RunLine], what: &str) -> Option<LineChart> {
    let ratios: Vec<f64> = lines.iter().flat_map(|l| l.ratios).copied().collect();
    let series = |l: &RunLine| Series {
        label: l.label.clone(),
        class: l.class.clone(),
        marker: l.marker,
        points: l
            .ratios
            .iter()
            .zip(l.values)
            .map(|(&x, v)| Point {
                x,
                y: v.mean,
                low: v.low,
                high: v.high,
                tip: format!("{}, {} kept: {what} {}", l.label, percent_text(x), shares(*v)),
            })
            .collect(),
    };
    (!ratios.is_empty()).then(|| LineChart {
        title: format!("{what}, by share of KV pairs kept"),
        x: Axis::kept(KEPT, &ratios),
        y: Axis::percent(what),
        series: lines.iter().map(series).collect(),
        reference: None,
    })
}

/// Below this ratio of the highest to the lowest loss a linear axis shows as much, with more ticks.
const LOG_FROM: f64 = 1.8;

/// An axis for positive numbers that may lie far apart; `None` of nothing.
fn wide_axis(label: &str, values: impl Iterator<Item = f64>) -> Option<Axis> {
    let finite = values.filter(|v| v.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if !low.is_finite() {
        return None;
    }
    Some(if low > 0.0 && high / low > LOG_FROM {
        Axis::nice_log(&format!("{label} (log scale)"), low, high)
    } else {
        Axis::nice(label, low, high, 5)
    })
}

/// Training loss by step, and the validation loss where there is one.
pub fn loss(metrics: &Metrics) -> Option<LineChart> {
    let train: Vec<(u64, f64)> = metrics.train.iter().map(|p| (p.step, p.loss)).collect();
    let validation: Vec<(u64, f64)> =
        metrics.validation.iter().filter_map(|p| Some((p.step, p.loss?))).collect();
    // The first steps are far above the rest: on a log scale both can be seen.
    let y = wide_axis("loss", train.iter().chain(&validation).map(|p| p.1))?;
    let series = vec![
        curve("", "c-raw", Marker::None, &train, "training loss"),
        curve("training", "c-train", Marker::None, &running_mean(&train), "training loss, running mean"),
        curve("validation", "c-validation", Marker::Circle, &validation, "validation loss"),
    ];
    Some(by_step("Loss by optimizer step", series, y))
}

/// Learning rate by step.
pub fn learning_rate(metrics: &Metrics) -> Option<LineChart> {
    let rates: Vec<(u64, f64)> = metrics.train.iter().filter_map(|p| Some((p.step, p.lr?))).collect();
    let highest = rates.iter().map(|r| r.1).filter(|r| r.is_finite()).reduce(f64::max)?;
    let y = Axis::nice("learning rate", 0.0, highest, 4);
    let series = vec![curve("learning rate", "c-train", Marker::None, &rates, "learning rate")];
    Some(by_step("Learning rate by optimizer step", series, y))
}

/// Norm of the gradient by step, before clipping.
pub fn gradient_norm(metrics: &Metrics) -> Option<LineChart> {
    let norms: Vec<(u64, f64)> =
        metrics.train.iter().filter_map(|p| Some((p.step, p.gradient_norm?))).collect();
    let y = wide_axis("gradient norm", norms.iter().map(|n| n.1))?;
    let series = vec![
        curve("", "c-raw", Marker::None, &norms, "gradient norm"),
        curve("running mean", "c-train", Marker::None, &running_mean(&norms), "gradient norm, running mean"),
    ];
    Some(by_step("Gradient norm by optimizer step", series, y))
}

/// A run's name, class and marker, and its points by step.
pub type RunCurve = (String, String, Marker, Vec<(u64, f64)>);

/// One curve per run over its own steps; `None` of nothing.
pub fn runs_by_step(title: &str, label: &str, runs: &[RunCurve]) -> Option<LineChart> {
    let y = wide_axis(label, runs.iter().flat_map(|r| &r.3).map(|p| p.1))?;
    let series = runs.iter().map(|(name, class, marker, points)| {
        curve(name, class, *marker, points, &format!("{name}, {label}"))
    });
    Some(by_step(title, series.collect(), y))
}

/// Validation recall by step, one line per retention ratio.
pub fn validation_recall(metrics: &Metrics) -> Option<LineChart> {
    let mut ratios: Vec<f64> = metrics
        .validation
        .iter()
        .flat_map(|p| &p.recall)
        .filter(|r| r.0 == Policy::Pair.name())
        .map(|r| r.1)
        .collect();
    ratios.sort_by(|a, b| b.total_cmp(a));
    ratios.dedup();
    // Five lines can be distinguished; where much is kept, every mapper looks good.
    ratios.drain(..ratios.len().saturating_sub(5));
    let line = |&ratio: &f64, index: usize| {
        let points: Vec<(u64, f64)> = metrics
            .validation
            .iter()
            .filter_map(|p| {
                let found = p.recall.iter().find(|r| r.0 == Policy::Pair.name() && r.1 == ratio)?;
                Some((p.step, found.2))
            })
            .collect();
        let name = format!("{} kept", percent_text(ratio));
        curve(&name, &format!("c-ratio{index}"), Marker::Circle, &points, &format!("recall at {name}"))
    };
    let series: Vec<Series> = ratios.iter().enumerate().map(|(i, r)| line(r, i)).collect();
    let all = || series.iter().flat_map(|s| &s.points).map(|p| p.y);
    let low = all().fold(f64::INFINITY, f64::min);
    let high = all().fold(f64::NEG_INFINITY, f64::max);
    if !low.is_finite() {
        return None;
    }
    let y = Axis::nice("recall of KVzip's choice, %", low * 100.0, high * 100.0, 5).of_shares();
    Some(by_step("Validation recall by optimizer step", series, y))
}

fn by_step(title: &str, series: Vec<Series>, y: Axis) -> LineChart {
    let last = series.iter().flat_map(|s| &s.points).map(|p| p.x).fold(0.0, f64::max);
    LineChart {
        title: title.to_owned(),
        x: Axis::nice("optimizer step", 0.0, last, 5),
        y,
        series: series.into_iter().filter(|s| !s.points.is_empty()).collect(),
        reference: None,
    }
}

fn curve(label: &str, class: &str, marker: Marker, points: &[(u64, f64)], what: &str) -> Series {
    let point = |&(step, y): &(u64, f64)| Point {
        x: step as f64,
        y,
        low: y,
        high: y,
        tip: format!("step {step}: {what} {}", significant(y)),
    };
    let points = points.iter().filter(|p| p.1.is_finite()).map(point).collect();
    Series { label: label.to_owned(), class: class.to_owned(), marker, points }
}

/// Four significant digits: losses and learning rates differ by powers of ten.
fn significant(v: f64) -> String {
    let digits = if v == 0.0 { 0.0 } else { (3.0 - v.abs().log10().floor()).clamp(0.0, 9.0) };
    format!("{v:.*}", digits as usize)
}

/// Mean over the neighbours on both sides, fewer at the ends.
pub fn running_mean(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let mean = |i: usize| {
        let reach = SMOOTH_REACH.min(i).min(points.len() - 1 - i);
        let window = &points[i - reach..=i + reach];
        window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

/// KVzip's budget per head, then the recall of the mapper and of the head prior.
pub fn heads(heads: &HeadRecall) -> Vec<HeatMap> {
    let absent = "KVzip keeps nothing here";
    let mut maps = vec![HeatMap {
        title: "Share that KVzip keeps".to_owned(),
        cells: heads.kvzip_kept.iter().map(|row| row.iter().map(|&v| Some(v)).collect()).collect(),
        what: "KVzip keeps".to_owned(),
        absent: absent.to_owned(),
        tone: Tone::Root,
    }];
    for wanted in [MethodName::MAPPER, MethodName::HEAD_PRIOR] {
        let found = heads.methods.iter().find(|m| m.method == wanted);
        maps.extend(found.map(|m| HeatMap {
            title: format!("Recall, {}", wanted.name()),
            cells: m.recall.clone(),
            what: "recall".to_owned(),
            absent: absent.to_owned(),
            tone: Tone::Linear,
        }));
    }
    maps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::METHODS;
    use crate::metrics::TrainPoint;

    #[test]
    fn losses_that_never_came_make_no_chart() {
        assert!(loss(&Metrics::default()).is_none());
        assert!(validation_recall(&Metrics::default()).is_none());
        let point = |loss| TrainPoint { step: 1, loss, ..TrainPoint::default() };
        let nan = Metrics { train: vec![point(f64::NAN)], validation: Vec::new() };
        assert!(loss(&nan).is_none());
        let one = Metrics { train: vec![point(0.5)], validation: Vec::new() };
        let svg = loss(&one).unwrap().svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(learning_rate(&one).is_none() && gradient_norm(&one).is_none(), "of an earlier version");
    }

    #[test]
    fn a_chart_comes_wide_and_narrow_with_a_box_for_every_line() {
        let at = |mean: f64| Interval { mean, low: mean - 0.1, high: mean + 0.1 };
        let cells = [(MethodName::MAPPER, 0.1, at(0.8)), (MethodName::RANDOM, 0.1, at(0.8))];
        let figure =
            by_ratio(METHODS, cells.into_iter(), "recall", Axis::percent("found"), shares).unwrap().figure();
        assert_eq!(figure.matches("<svg class=\"chart ").count(), 2);
        assert_eq!(figure.matches("class=\"end\"").count(), 2, "names in the wide one alone");
        for i in [0, 1] {
            assert_eq!(figure.matches(&format!("class=\"l{i}\" checked")).count(), 1);
            assert_eq!(figure.matches(&format!("class=\"series s{i} ")).count(), 2);
        }
        let whiskers: Vec<&str> = figure.split("class=\"whisker\" x1=").skip(1).map(|t| &t[..8]).collect();
        assert_ne!(whiskers[0], whiskers[1], "intervals of equal methods lie beside each other");
    }

    #[test]
    fn labels_of_many_methods_stay_apart_and_inside_the_chart() {
        for methods in [3, 14, 40] {
            let cell = |i: usize| {
                let name = MethodName::new(&format!("made-up-{i}"));
                (name, 0.05, Interval::exact(0.9 + 0.001 * i as f64))
            };
            let cells = (0..methods).map(cell);
            let chart = by_ratio(METHODS, cells, "recall", Axis::percent("found"), shares).unwrap();
            let svg = chart.svg();
            let chart_height: f64 =
                svg.split('"').nth(3).unwrap().split(' ').nth(3).unwrap().parse().unwrap();
            let height = |label: &str| -> f64 {
                let y = label.split(" y=\"").nth(1).unwrap();
                y.split('"').next().unwrap().parse().unwrap()
            };
            let mut heights: Vec<f64> = svg.split("class=\"end\"").skip(1).map(height).collect();
            heights.sort_by(f64::total_cmp);
            assert_eq!(heights.len(), methods);
            assert!(heights[0] > 0.0 && heights[methods - 1] < chart_height - 20.0, "{heights:?}");
            for pair in heights.windows(2) {
                assert!(pair[1] - pair[0] > 12.0, "{methods} methods: {pair:?}");
            }
        }
    }

    #[test]
    fn running_means_keep_the_ends() {
        let means = running_mean(&[(1, 4.0), (2, 2.0), (3, 3.0)]);
        assert_eq!(means, [(1, 4.0), (2, 3.0), (3, 3.0)]);
    }
}
