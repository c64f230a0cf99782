//! Credentials from the usual places, for the builders of object_store.
//!
//! | bucket | places, the first that has them |
//! |---|---|
//! | S3 | `AWS_...` variables; the profile of `~/.aws/credentials` and `~/.aws/config`; web identity, container, machine |
//! | Google | `GOOGLE_...` variables; none for `STORAGE_EMULATOR_HOST`; `gcloud`'s application default credentials; the machine |
//! | Azure | `AZURE_...` variables, a connection string; workload identity; the machine |

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::{GcpCredential, GoogleCloudStorageBuilder};
use object_store::{BackoffConfig, ObjectStore, RetryConfig, StaticCredentialProvider};
use pkv_core::hinted;

use crate::address::{Address, Scheme};
use crate::endpoint;
use crate::http::Connector;
use crate::options::Options;
use crate::redact::Secrets;

/// Parts of the names of variables that hold what must not be shown.
const SECRET: [&str; 7] = ["SECRET", "TOKEN", "KEY", "PASSWORD", "CREDENTIAL", "SAS", "CONNECTION_STRING"];

/// Whether a variable holds what must not be shown. The names of files may be.
pub fn is_credential(name: &str, value: &str) -> bool {
    let name = name.to_uppercase();
    let is_ours = ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix));
    is_ours && SECRET.iter().any(|part| name.contains(part)) && !Path::new(value).is_absolute()
}

/// A bucket's client, and what must not be shown of it.
pub(crate) fn connect(address: &Address, options: &Options) -> Result<(Arc<dyn ObjectStore>, Secrets)> {
    let mut variables = options.variables.clone();
    if address.scheme == Scheme::S3 {
        add_profile(&mut variables)?;
    }
    endpoint::resolve(address.scheme, &mut variables);
    let secrets = variables.iter().filter(|(name, value)| is_credential(name, value));
    let secrets = Secrets::new(secrets.map(|(_, value)| value.clone()));
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(15),
            base: 2.0,
        },
        max_retries: 10,
        retry_timeout: options.retry,
    };
    let connector = Connector { patience: options.patience };
    let store = build(address, &variables, retry, connector).map_err(|e| {
        let text = secrets.redact(&format!("{e:#}"));
        match pkv_core::Hinted::find(&e) {
            Some(hint) => hinted(text, hint.hint()).of(hint.kind()).into(),
            None => anyhow::anyhow!(text).context(hinted(
                format!("cannot use `{}`", address.root()),
                "see docs/scale.md, Buckets, for the variables and files that are read",
            )),
        }
    })?;
    Ok((store, secrets))
}

fn build(
    address: &Address,
    variables: &BTreeMap<String, String>,
    retry: RetryConfig,
    connector: Connector,
) -> Result<Arc<dyn ObjectStore>> {
    let of = |prefix: &str| {
        let own = variables.iter().filter(|(name, _)| name.starts_with(prefix)).collect::<Vec<_>>();
        own.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
    };
    endpoint::check(address.scheme, variables)?;
    Ok(match address.scheme {
        Scheme::S3 => {
            check_s3(variables)?;
            let mut builder = AmazonS3Builder::new();
            for (name, value) in of("AWS_") {
                if let Ok(key) = name.parse() {
                    builder = builder.with_config(key, value);
                }
            }
            if let Some((_, endpoint)) = endpoint::endpoint(Scheme::S3, variables) {
                builder = builder.with_endpoint(endpoint);
            }
            // Not every server that speaks S3 removes several objects at once.
            let builder = builder.with_bucket_name(&address.bucket).with_disable_bulk_delete(true);
            Arc::new(builder.with_retry(retry).with_http_connector(connector).build()?)
        }
        Scheme::Google => {
            let mut builder = GoogleCloudStorageBuilder::new();
            for (name, value) in of("GOOGLE_") {
                if let Ok(key) = name.parse() {
                    builder = builder.with_config(key, value);
                }
            }
            if is_emulated(variables) {
                let nobody = GcpCredential { bearer: String::new() };
                builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(nobody)));
            }
            let builder = builder.with_bucket_name(&address.bucket).with_retry(retry);
            Arc::new(builder.with_http_connector(connector).build()?)
        }
        Scheme::Azure => {
            check_azure(variables)?;
            let mut builder = MicrosoftAzureBuilder::new();
            for (name, value) in of("AZURE_") {
                if let Ok(key) = name.parse() {
                    builder = builder.with_config(key, value);
                }
            }
            let builder = builder.with_container_name(&address.bucket).with_retry(retry);
            Arc::new(builder.with_http_connector(connector).build()?)
        }
    })
}

/// Whether Google's server is an emulator, which asks for no credentials.
fn is_emulated(variables: &BTreeMap<String, String>) -> bool {
    let given = |name: &&str| variables.get(*name).is_some_and(|value| !value.is_empty());
    let own = [
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_PATH",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_BEARER_TOKEN",
    ];
    given(&endpoint::GOOGLE_EMULATOR) && !own.iter().any(given)
}

fn check_azure(variables: &BTreeMap<String, String>) -> Result<()> {
    ensure!(
        variables.get("AZURE_STORAGE_ACCOUNT_NAME").is_some_and(|name| !name.is_empty()),
        hinted(
            "there is no account for Azure",
            "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or another credential, or \
             AZURE_STORAGE_CONNECTION_STRING"
        )
    );
    Ok(())
}

/// What would fail late and unclearly.
fn check_s3(variables: &BTreeMap<String, String>) -> Result<()> {
    let has = |name: &str| variables.get(name).is_some_and(|value| !value.is_empty());
    let given = ["AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE"];
    let container = ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];
    if given.iter().chain(&container).any(|name| has(name)) || is_on_amazon(variables) {
        return Ok(());
    }
    bail!(hinted(
        "there are no credentials for S3",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with a profile of `~/.aws/credentials`",
    ))
}

/// Whether the machine has credentials of its own; where it has none, asking takes long.
fn is_on_amazon(variables: &BTreeMap<String, String>) -> bool {
    let off = variables.get("AWS_EC2_METADATA_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"));
    let metadata = SocketAddr::from(([169, 254, 169, 254], 80));
    !off && endpoint::endpoint(Scheme::S3, variables).is_none()
        && TcpStream::connect_timeout(&metadata, Duration::from_secs(1)).is_ok()
}

/// What the files of the AWS command line say, where no variable does.
fn add_profile(variables: &mut BTreeMap<String, String>) -> Result<()> {
    let home = variables.get("HOME").map(PathBuf::from);
    let place = |variable: &str, name: &str| {
        let own = variables.get(variable).map(PathBuf::from);
        own.or_else(|| home.as_ref().map(|home| home.join(".aws").join(name)))
    };
    let named = variables.get("AWS_PROFILE").or_else(|| variables.get("AWS_DEFAULT_PROFILE")).cloned();
    let profile = named.clone().unwrap_or_else(|| "default".to_owned());
    let mut found = BTreeMap::new();
    for (variable, file) in [("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")] {
        let Some(path) = place(variable, file).filter(|path| path.is_file()) else { continue };
        let text =
            pkv_core::read_small_text(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        found.extend(section(&text, &profile));
    }
    ensure!(
        named.is_none() || !found.is_empty() || variables.contains_key("AWS_ACCESS_KEY_ID"),
        hinted(
            format!("AWS_PROFILE is `{profile}`, and there is no such profile"),
            "check `~/.aws/credentials` and `~/.aws/config`"
        )
    );
    // A key of the environment goes with the secret and the token of the environment.
    let has_key = variables.contains_key("AWS_ACCESS_KEY_ID");
    for (key, value) in found {
        let name = match key.as_str() {
            "aws_access_key_id" | "aws_secret_access_key" | "aws_session_token" if has_key => continue,
            "aws_access_key_id" | "aws_secret_access_key" | "aws_session_token" => key.to_uppercase(),
            "region" => "AWS_REGION".to_owned(),
            "endpoint_url" => "AWS_ENDPOINT_URL".to_owned(),
            _ => continue,
        };
        variables.entry(name).or_insert(value);
    }
    if let (None, Some(region)) = (variables.get("AWS_REGION"), variables.get("AWS_DEFAULT_REGION").cloned())
    {
        variables.insert("AWS_REGION".to_owned(), region);
    }
    Ok(())
}

/// The pairs of one profile.
fn section(text: &str, profile: &str) -> Vec<(String, String)> {
    let mut is_in = false;
    let mut pairs = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            is_in = name.trim().trim_start_matches("profile ").trim() == profile;
        } else if let Some((key, value)) =
            line.split_once('=').filter(|_| is_in && !line.starts_with(['#', ';']))
        {
            pairs.push((key.trim().to_lowercase(), value.trim().to_owned()));
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_profile_gives_what_the_environment_does_not() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(home.path().join(".aws").join(name), text).unwrap();
        write(
            "credentials",
            "[default]\naws_access_key_id = A\naws_secret_access_key=S\n[lab]\naws_access_key_id=L\n",
        );
        write(
            "config",
            "# c\n[profile lab]\nregion = eu-1\nendpoint_url=http://localhost:9\n[default]\nregion=us-1\n",
        );
        let home = home.path().to_str().unwrap();
        let mut found = map(&[("HOME", home)]);
        add_profile(&mut found).unwrap();
        assert_eq!((&*found["AWS_ACCESS_KEY_ID"], &*found["AWS_REGION"]), ("A", "us-1"));
        let mut found = map(&[("HOME", home), ("AWS_PROFILE", "lab")]);
        add_profile(&mut found).unwrap();
        let there = endpoint::endpoint(Scheme::S3, &found);
        assert_eq!(
            (&*found["AWS_ACCESS_KEY_ID"], there),
            ("L", Some(("AWS_ENDPOINT_URL", "http://localhost:9")))
        );
        let mut found = map(&[("HOME", home), ("AWS_ACCESS_KEY_ID", "E"), ("AWS_DEFAULT_REGION", "d")]);
        add_profile(&mut found).unwrap();
        assert_eq!((&*found["AWS_ACCESS_KEY_ID"], found.get("AWS_SECRET_ACCESS_KEY")), ("E", None));
        let mut found = map(&[("HOME", home), ("AWS_PROFILE", "other")]);
        assert!(add_profile(&mut found).unwrap_err().to_string().contains("`other`"));
    }

    #[test]
    fn what_would_fail_late_is_refused_at_once() {
        let off = ("AWS_EC2_METADATA_DISABLED", "true");
        let error = check_s3(&map(&[off])).unwrap_err().to_string();
        assert!(error.contains("no credentials"), "{error}");
        check_s3(&map(&[off, ("AWS_ACCESS_KEY_ID", "A")])).unwrap();
        assert!(check_azure(&map(&[])).unwrap_err().to_string().contains("no account"));
        check_azure(&map(&[("AZURE_STORAGE_ACCOUNT_NAME", "lab")])).unwrap();
    }

    #[test]
    fn an_emulator_of_google_is_asked_without_credentials_unless_some_are_given() {
        let emulator = ("STORAGE_EMULATOR_HOST", "localhost:1");
        assert!(is_emulated(&map(&[emulator])) && !is_emulated(&map(&[])));
        assert!(!is_emulated(&map(&[emulator, ("GOOGLE_BEARER_TOKEN", "t")])));
    }
}
