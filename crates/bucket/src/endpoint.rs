//! Where the server of a bucket is, if it is not the provider's own: variables of emulators, translated to
//! those that object_store reads, and whether it may be reached without TLS.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Result, ensure};
use pkv_core::{FailureKind, hinted};

use crate::address::Scheme;

/// The account of Azurite, and its key, which is the same everywhere and in its documentation.
const EMULATOR_ACCOUNT: &str = "devstoreaccount1";
const EMULATOR_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// Where Azurite listens by itself.
const EMULATOR_URL: &str = "http://127.0.0.1:10000";

const ACCOUNT: &str = "AZURE_STORAGE_ACCOUNT_NAME";
const KEY: &str = "AZURE_STORAGE_ACCOUNT_KEY";
const AZURE_ENDPOINT: &str = "AZURE_STORAGE_ENDPOINT";
const GOOGLE_ENDPOINT: &str = "GOOGLE_BASE_URL";
/// What Google's own programs read.
pub(crate) const GOOGLE_EMULATOR: &str = "STORAGE_EMULATOR_HOST";

type Variables = BTreeMap<String, String>;

fn get<'a>(variables: &'a Variables, name: &str) -> Option<&'a str> {
    variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
}

fn is_true(variables: &Variables, name: &str) -> bool {
    get(variables, name).is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1")
}

/// Set a variable that has no value.
fn default(variables: &mut Variables, name: &str, value: impl Into<String>) {
    if get(variables, name).is_none() {
        variables.insert(name.to_owned(), value.into());
    }
}

/// Let the variables of object_store say what those of emulators and of the providers' own programs say.
pub(crate) fn resolve(scheme: Scheme, variables: &mut Variables) {
    match scheme {
        Scheme::S3 => {}
        Scheme::Google => {
            if let Some(host) = get(variables, GOOGLE_EMULATOR) {
                let has_scheme = host.contains("://");
                let url = if has_scheme { host.to_owned() } else { format!("http://{host}") };
                default(variables, GOOGLE_ENDPOINT, url);
            }
            trim(variables, GOOGLE_ENDPOINT);
        }
        Scheme::Azure => {
            if let Some(text) = get(variables, "AZURE_STORAGE_CONNECTION_STRING").map(str::to_owned) {
                connection(variables, &text);
            }
            if let Some(account) = get(variables, "AZURE_STORAGE_ACCOUNT").map(str::to_owned) {
                default(variables, ACCOUNT, account);
            }
            let asked = is_true(variables, "AZURE_STORAGE_USE_EMULATOR");
            variables.remove("AZURE_STORAGE_USE_EMULATOR");
            let is_emulated = asked || get(variables, ACCOUNT) == Some(EMULATOR_ACCOUNT);
            let has_endpoint =
                [AZURE_ENDPOINT, "AZURE_ENDPOINT"].iter().any(|name| get(variables, name).is_some());
            if is_emulated {
                default(variables, ACCOUNT, EMULATOR_ACCOUNT);
                let others = ["AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"];
                if !others.iter().any(|name| get(variables, name).is_some()) {
                    default(variables, KEY, EMULATOR_KEY);
                }
            }
            if is_emulated && !has_endpoint {
                // The name of the account is in the path there, and not in that of the host.
                let url = get(variables, "AZURITE_BLOB_STORAGE_URL").unwrap_or(EMULATOR_URL);
                let account = get(variables, ACCOUNT).unwrap_or(EMULATOR_ACCOUNT);
                let url = url.trim_end_matches('/');
                let has_account = url.rsplit('/').next() == Some(account);
                let url = if has_account { url.to_owned() } else { format!("{url}/{account}") };
                variables.insert(AZURE_ENDPOINT.to_owned(), url);
            }
            [AZURE_ENDPOINT, "AZURE_ENDPOINT"].iter().for_each(|name| trim(variables, name));
        }
    }
}

fn trim(variables: &mut Variables, name: &str) {
    if let Some(url) = variables.get_mut(name) {
        url.truncate(url.trim_end_matches('/').len());
    }
}

/// What a connection string of Azure says, where no variable does.
fn connection(variables: &mut Variables, text: &str) {
    let pairs: BTreeMap<&str, &str> = text.split(';').filter_map(|pair| pair.split_once('=')).collect();
    let named = [
        ("AccountName", ACCOUNT),
        ("AccountKey", KEY),
        ("SharedAccessSignature", "AZURE_STORAGE_SAS_TOKEN"),
        ("BlobEndpoint", AZURE_ENDPOINT),
    ];
    for (name, variable) in named {
        if let Some(value) = pairs.get(name) {
            default(variables, variable, *value);
        }
    }
    if pairs.get("UseDevelopmentStorage").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        default(variables, "AZURE_STORAGE_USE_EMULATOR", "true");
    }
}

/// The server, where one is named: the variable, and the address without a slash at its end.
pub(crate) fn endpoint(scheme: Scheme, variables: &Variables) -> Option<(&'static str, &str)> {
    let names: &[&'static str] = match scheme {
        Scheme::S3 => &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"],
        Scheme::Google => &[GOOGLE_ENDPOINT],
        Scheme::Azure => &[AZURE_ENDPOINT, "AZURE_ENDPOINT"],
    };
    let found = names.iter().find_map(|name| Some((*name, get(variables, name)?)));
    found.map(|(name, url)| (name, url.trim_end_matches('/')))
}

/// Refuse a server without TLS that is not on this machine, unless the user trusts the network.
pub(crate) fn check(scheme: Scheme, variables: &Variables) -> Result<()> {
    let Some((name, url)) = endpoint(scheme, variables) else { return Ok(()) };
    let uri = url.parse::<ureq::http::Uri>().ok().filter(|uri| uri.host().is_some());
    let protocol = uri.as_ref().and_then(|uri| uri.scheme_str());
    ensure!(
        matches!(protocol, Some("http" | "https")),
        hinted(
            format!("`{name}` is no address of a server"),
            "write `https://HOST` or `https://HOST:PORT`, or leave it out for the provider's own server"
        )
        .of(FailureKind::Usage)
    );
    let allow = match scheme {
        Scheme::S3 => "AWS_ALLOW_HTTP",
        Scheme::Google => "GOOGLE_ALLOW_HTTP",
        Scheme::Azure => "AZURE_ALLOW_HTTP",
    };
    let is_here = uri.as_ref().and_then(ureq::http::Uri::host).is_some_and(is_here);
    ensure!(
        protocol == Some("https") || is_here || is_true(variables, allow),
        hinted(
            format!(
                "the server of `{}://` is `http://` (`{name}`): everything would travel where others can read and change it",
                scheme.name()
            ),
            format!("use `https://`, or set {allow}=true in a network that you trust")
        )
        .of(FailureKind::Usage)
    );
    Ok(())
}

/// Whether a host is this machine, by its name or number alone.
fn is_here(host: &str) -> bool {
    let number = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || number.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Variables {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn without_tls_a_server_must_be_on_this_machine() {
        let of = |scheme, url: &str, more: &[(&str, &str)]| {
            let mut variables = map(more);
            let name = match scheme {
                Scheme::S3 => "AWS_ENDPOINT_URL",
                Scheme::Google => "STORAGE_EMULATOR_HOST",
                Scheme::Azure => "AZURE_STORAGE_ENDPOINT",
            };
            variables.insert(name.to_owned(), url.to_owned());
            resolve(scheme, &mut variables);
            check(scheme, &variables)
        };
        for scheme in [Scheme::S3, Scheme::Google, Scheme::Azure] {
            for url in [
                "http://localhost:1",
                "http://127.0.0.1:9000/",
                "http://127.1.2.3",
                "http://[::1]:9000",
                "http://[::1]/devstoreaccount1",
                "https://s3.example",
            ] {
                of(scheme, url, &[]).unwrap_or_else(|e| panic!("{url}: {e:#}"));
            }
            for url in [
                "http://s3.example",
                "http://[2001:db8::1]:9000",
                "http://[::ffff:1.2.3.4]",
                "http://localhost:x@s3.example",
                "http://localhost.example",
                "http://127.0.0.1.example",
            ] {
                let error = of(scheme, url, &[]).expect_err(url).to_string();
                assert!(error.contains("`http://`") || error.contains("no address"), "{url}: {error}");
            }
            assert!(of(scheme, "ftp://s3.example", &[]).unwrap_err().to_string().contains("no address"));
        }
        of(Scheme::S3, "http://s3.example", &[("AWS_ALLOW_HTTP", "true")]).unwrap();
        of(Scheme::Azure, "http://s3.example", &[("AZURE_ALLOW_HTTP", "1")]).unwrap();
        assert!(of(Scheme::Google, "http://s3.example", &[("AWS_ALLOW_HTTP", "true")]).is_err());
        of(Scheme::Google, "s3.example:4443", &[("GOOGLE_ALLOW_HTTP", "TRUE")]).unwrap();
    }

    #[test]
    fn emulators_are_found_by_the_variables_that_people_use() {
        let of = |scheme, pairs: &[(&str, &str)]| {
            let mut variables = map(pairs);
            resolve(scheme, &mut variables);
            variables
        };
        let google = |pairs: &[(&str, &str)]| of(Scheme::Google, pairs)[GOOGLE_ENDPOINT].clone();
        assert_eq!(google(&[(GOOGLE_EMULATOR, "localhost:4443")]), "http://localhost:4443");
        assert_eq!(google(&[(GOOGLE_EMULATOR, "https://h/")]), "https://h");
        assert_eq!(google(&[(GOOGLE_EMULATOR, "h"), (GOOGLE_ENDPOINT, "https://own")]), "https://own");
        let azure = |pairs: &[(&str, &str)]| {
            let v = of(Scheme::Azure, pairs);
            [ACCOUNT, KEY, AZURE_ENDPOINT].map(|name| v.get(name).cloned().unwrap_or_default())
        };
        let here = [EMULATOR_ACCOUNT, EMULATOR_KEY, "http://127.0.0.1:10000/devstoreaccount1"];
        for pairs in [
            &[("AZURE_STORAGE_USE_EMULATOR", "true")][..],
            &[(ACCOUNT, "devstoreaccount1")],
            &[("AZURE_STORAGE_ACCOUNT", "devstoreaccount1")],
            &[("AZURE_STORAGE_CONNECTION_STRING", "UseDevelopmentStorage=true")],
        ] {
            assert_eq!(azure(pairs), here, "{pairs:?}");
        }
        let elsewhere =
            azure(&[(ACCOUNT, "devstoreaccount1"), ("AZURITE_BLOB_STORAGE_URL", "http://localhost:9/")]);
        assert_eq!(elsewhere[2], "http://localhost:9/devstoreaccount1");
        let text =
            "DefaultEndpointsProtocol=http;AccountName=me;AccountKey=a2V5==;BlobEndpoint=http://[::1]:9/me/";
        let said = azure(&[("AZURE_STORAGE_CONNECTION_STRING", text)]);
        assert_eq!(said, ["me", "a2V5==", "http://[::1]:9/me"]);
        let own = azure(&[(ACCOUNT, "lab"), (KEY, "a2V5")]);
        assert_eq!(own, ["lab", "a2V5", ""], "an account of Azure itself");
        assert_eq!(azure(&[("AZURE_STORAGE_USE_EMULATOR", "false")]), ["", "", ""]);
    }
}
