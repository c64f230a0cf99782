//! `[launch]`: how `launch` starts the stages on a cluster. No number depends on it.

use anyhow::{Result, ensure};
use pkv_core::hinted;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Workers on Slurm or Kubernetes. A file that `launch --profile` names has the same keys without `launch.`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LaunchSection {
    /// The command of this program where the workers run.
    pub program: String,
    /// Environment variables of the workers, as `NAME=value`. They are shown, and kept in `run.json`: secrets
    /// belong into `launch.k8s.secrets`, or into a file that a line of `launch.slurm.lines` reads.
    pub environment: Vec<String>,
    pub slurm: SlurmSection,
    pub k8s: K8sSection,
}

/// Jobs of Slurm. An empty text leaves the choice to the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SlurmSection {
    /// Partition, as in `sbatch --partition`.
    pub partition: String,
    /// Account that is charged.
    pub account: String,
    /// Quality of service.
    pub qos: String,
    /// Time limit of a job, such as `4:00:00`. A worker that reaches it goes back to the queue and continues.
    pub time: String,
    /// More options of sbatch, such as `--mem=64G`, one an entry.
    pub options: Vec<String>,
    /// Lines of shell before the worker, taken as they are, such as `module load cuda`.
    pub lines: Vec<String>,
}

/// Jobs of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct K8sSection {
    /// Container image, such as the one that `scripts/Dockerfile` builds.
    pub image: String,
    /// Namespace; kubectl's own if empty.
    pub namespace: String,
    /// Persistent volume claims that all workers mount, as `CLAIM:/PATH`. The run folder must be on one that
    /// several nodes may write.
    pub volumes: Vec<String>,
    /// Secrets whose keys become environment variables.
    pub secrets: Vec<String>,
    /// CPU cores that a worker asks for, such as `8`; none asked for if empty.
    pub cpu: String,
    /// Memory that a worker asks for and may use, such as `64Gi`; no limit if empty.
    pub memory: String,
    /// Name of the resource that `--gpus-per-worker` counts.
    pub gpu: String,
    /// Labels that a node must have, as `KEY=VALUE`.
    pub node_selector: Vec<String>,
    /// Keys of taints that workers tolerate.
    pub tolerations: Vec<String>,
}

impl Default for LaunchSection {
    fn default() -> Self {
        Self {
            program: "proxykv-train".to_owned(),
            environment: Vec::new(),
            slurm: SlurmSection::default(),
            k8s: K8sSection::default(),
        }
    }
}

impl Default for K8sSection {
    fn default() -> Self {
        Self {
            image: "proxykv-train".to_owned(),
            namespace: String::new(),
            volumes: Vec::new(),
            secrets: Vec::new(),
            cpu: String::new(),
            memory: String::new(),
            gpu: "nvidia.com/gpu".to_owned(),
            node_selector: Vec::new(),
            tolerations: Vec::new(),
        }
    }
}

/// The two parts of `NAME=value` or `CLAIM:/PATH`.
fn pairs(entries: &[String], separator: char) -> impl Iterator<Item = (&str, &str)> {
    entries.iter().filter_map(move |entry| entry.split_once(separator))
}

impl LaunchSection {
    /// Names of environment variables with their values.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        pairs(&self.environment, '=')
    }

    pub(crate) fn check(&self) -> Result<()> {
        let Self { program, environment, slurm, k8s } = self;
        let is_name = |(name, _): (&str, &str)| {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            name.starts_with(|c: char| plain(c) && !c.is_ascii_digit()) && name.chars().all(plain)
        };
        let labelled = |(key, _): (&str, &str)| !key.is_empty();
        let mounted = |(claim, path): (&str, &str)| !claim.is_empty() && path.starts_with('/');
        each("launch.environment", environment, "NAME=value", |e| e.split_once('=').is_some_and(is_name))?;
        each("launch.slurm.options", &slurm.options, "--mem=64G", |e| e.starts_with('-') && one_line(e))?;
        each("launch.k8s.volumes", &k8s.volumes, "CLAIM:/PATH", |e| e.split_once(':').is_some_and(mounted))?;
        each("launch.k8s.node_selector", &k8s.node_selector, "KEY=VALUE", |e| {
            e.split_once('=').is_some_and(labelled)
        })?;
        for (key, value) in [
            ("launch.slurm.partition", &slurm.partition),
            ("launch.slurm.account", &slurm.account),
            ("launch.slurm.qos", &slurm.qos),
            ("launch.slurm.time", &slurm.time),
        ] {
            ensure!(
                one_line(value),
                hinted(format!("`{key}` is {value:?}"), "write it on one line, without control characters")
            );
        }
        for (key, value) in
            [("launch.program", program), ("launch.k8s.image", &k8s.image), ("launch.k8s.gpu", &k8s.gpu)]
        {
            ensure!(!value.trim().is_empty(), hinted(format!("`{key}` is empty"), "leave it out"));
        }
        let all = toml::to_string(self)?;
        // As TOML writes it.
        ensure!(
            !all.contains("\\u0000"),
            hinted("`launch` holds a character of value 0", "leave it out: no program takes it")
        );
        Ok(())
    }
}

impl K8sSection {
    /// Claims with the folders that they are mounted at.
    pub fn mounts(&self) -> impl Iterator<Item = (&str, &str)> {
        pairs(&self.volumes, ':')
    }

    /// Keys and values that a node's labels must have.
    pub fn selected(&self) -> impl Iterator<Item = (&str, &str)> {
        pairs(&self.node_selector, '=')
    }
}

fn one_line(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

fn each(key: &str, entries: &[String], form: &str, is_right: impl Fn(&str) -> bool) -> Result<()> {
    for (i, entry) in entries.iter().enumerate() {
        ensure!(
            is_right(entry),
            hinted(format!("`{key}[{i}]` is {entry:?}"), format!("write it as `{form}`"))
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_job_cannot_take_is_refused_by_its_key() {
        let of = |text: &str| toml::from_str::<LaunchSection>(text).unwrap();
        let right = "environment = [\"A_1=b=c\\nd\"]\nslurm = { options = [\"--mem=4G\"], time = \"1:00\" }\n\
                     k8s = { volumes = [\"runs:/data:/x\"], node_selector = [\"a/b=\"] }";
        assert_eq!(of(right).variables().collect::<Vec<_>>(), [("A_1", "b=c\nd")]);
        assert_eq!(of(right).k8s.mounts().collect::<Vec<_>>(), [("runs", "/data:/x")]);
        of(right).check().unwrap();
        for (wrong, key) in [
            ("environment = [\"1A=b\"]", "launch.environment[0]"),
            ("environment = [\"A=b\", \"A$(x)=b\"]", "launch.environment[1]"),
            ("environment = [\"A=\\u0000\"]", "launch"),
            ("slurm.partition = \"gpu\\n#SBATCH --uid=0\"", "launch.slurm.partition"),
            ("slurm.options = [\"mem=64G\"]", "launch.slurm.options[0]"),
            ("slurm.options = [\"--mem=1\\n--uid=0\"]", "launch.slurm.options[0]"),
            ("k8s.volumes = [\"runs\"]", "launch.k8s.volumes[0]"),
            ("k8s.volumes = [\"runs:data\"]", "launch.k8s.volumes[0]"),
            ("k8s.node_selector = [\"=x\"]", "launch.k8s.node_selector[0]"),
            ("k8s.image = \" \"", "launch.k8s.image"),
        ] {
            let error = of(wrong).check().unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{wrong}: {error}");
        }
    }
}
