//! Addresses: where a redirect may lead, whose they are, and how they are written and shown.

use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, percent_encode, utf8_percent_encode};
use ureq::Body;
use ureq::http::header::LOCATION;
use ureq::http::{HeaderMap, Response};
use url::{Origin, Url};

use crate::failure::Failure;

/// Redirects in a row, as browsers limit them.
pub(crate) const MOST_HOPS: usize = 10;

/// The address that an answer redirects to, if it does.
///
/// # Errors
/// It names none, or one that may not be followed.
pub(crate) fn redirect(from: &Url, response: &Response<Body>) -> Result<Option<Url>, Failure> {
    if ![301, 302, 303, 307, 308].contains(&response.status().as_u16()) {
        return Ok(None);
    }
    let wrong = |why: String| Failure::nonsense(format!("{} redirects {why}", shown(from)));
    // Storages write other letters than ASCII as they are.
    let location =
        response.headers().get(LOCATION).map(|l| percent_encode(l.as_bytes(), CONTROLS).to_string());
    let location = location.filter(|l| !l.trim().is_empty()).ok_or_else(|| wrong("to nowhere".to_owned()))?;
    let mut to = from.join(location.trim()).map_err(|e| wrong(format!("to no address: {e}")))?;
    if !is_http(&to) || !to.has_host() {
        return Err(wrong(format!("to `{}`, which is no web address", to.scheme())));
    }
    if from.scheme() == "https" && to.scheme() != "https" {
        return Err(wrong(format!("to {}, which is not encrypted", shown(&to))));
    }
    // A user that an answer names is not ours.
    if to.set_username("").and_then(|()| to.set_password(None)).is_err() {
        return Err(wrong("to no web address".to_owned()));
    }
    Ok(Some(to))
}

pub(crate) fn too_many_redirects(at: &Url) -> Failure {
    Failure::nonsense(format!("more than {MOST_HOPS} redirects, the last one at {}", shown(at)))
}

pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    let (a, b): (Origin, Origin) = (a.origin(), b.origin());
    a.is_tuple() && a == b
}

pub(crate) fn is_http(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https")
}

/// An address without its query, which signs it.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    format!("`{url}`")
}

/// A header's text.
pub(crate) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|v| v.to_str().ok()).map(str::trim).filter(|t| !t.is_empty())
}

/// `text` as one part of an address.
pub(crate) fn quoted(text: &str) -> String {
    const PLAIN: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    utf8_percent_encode(text, &PLAIN).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(from: &str, status: u16, location: &str) -> Result<Option<String>, String> {
        let response = Response::builder().status(status).header("Location", location);
        let response = response.body(Body::builder().data("")).unwrap();
        redirect(&Url::parse(from).unwrap(), &response).map(|u| u.map(Into::into)).map_err(|f| f.why())
    }

    #[test]
    fn redirects_are_joined_and_never_lead_to_less_secrecy() {
        let from = "https://hub/o/n/resolve/main/a";
        for (location, found) in [
            ("/api/x?y=1", "https://hub/api/x?y=1"),
            ("b", "https://hub/o/n/resolve/main/b"),
            ("//cdn/x", "https://cdn/x"),
            ("https://cdn:8/x", "https://cdn:8/x"),
            ("https://user:word@cdn/x", "https://cdn/x"),
            ("/x?name=ä%20b", "https://hub/x?name=%C3%A4%20b"),
        ] {
            assert_eq!(to(from, 302, location), Ok(Some(found.to_owned())));
        }
        assert!(to(from, 307, "http://hub/x").unwrap_err().contains("not encrypted"));
        assert!(to(from, 301, "file:///etc/passwd").unwrap_err().contains("no web address"));
        assert!(to(from, 308, "").unwrap_err().contains("nowhere"));
        assert_eq!(to(from, 200, "/x"), Ok(None));
        assert_eq!(to(from, 304, "/x"), Ok(None));
        assert!(to("http://hub/", 302, "https://hub/x").is_ok());
    }

    #[test]
    fn branches_and_file_names_are_one_part_of_an_address() {
        assert_eq!(quoted("feature/a b-1.x"), "feature%2Fa%20b-1.x");
        assert_eq!(quoted("ä#?%"), "%C3%A4%23%3F%25");
    }
}
