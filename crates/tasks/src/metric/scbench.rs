//! SCBench's own metrics (`scbench/compute_scores.py`, `scbench/repo_qa_utils.py` of microsoft/MInference).

use super::bleu::bleu;

/// `first_int_match`: the first run of digits, or nothing.
pub fn first_number(answer: &str) -> &str {
    answer.split(|c: char| !c.is_ascii_digit()).find(|run| !run.is_empty()).unwrap_or_default()
}

/// Whether the first number of `answer`, decimals included, is `wanted`; a whole `wanted` is compared with
/// its whole part.
pub fn math_find(answer: &str, wanted: &str) -> bool {
    let Some(start) = answer.find(|c: char| c.is_ascii_digit()) else { return false };
    let rest = &answer[start..];
    let digits = |text: &str| text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let mut end = digits(rest);
    if let Some(decimals) = rest[end..].strip_prefix('.').map(digits).filter(|n| *n > 0) {
        end += 1 + decimals;
    }
    let Ok(found) = rest[..end].parse::<f64>() else { return false };
    match wanted.parse::<i64>() {
        Ok(whole) => found.trunc() == whole as f64,
        Err(_) => wanted.parse::<f64>().is_ok_and(|w| found == w),
    }
}

/// `get_score_one_longbook_choice_eng`: `wanted` is the right option's text and its letter.
pub fn choice(answer: &str, wanted: &[String]) -> bool {
    let is_wanted = |text: &str| wanted.iter().any(|w| w == text);
    let answer = answer.trim();
    let Some(first) = answer.chars().next() else { return false };
    if "ABCD".contains(first) {
        return is_wanted(&first.to_string());
    }
    if is_wanted(answer) {
        return true;
    }
    let mut text: String = answer.chars().map(|c| if "\n\"'.,?!{}".contains(c) { ' ' } else { c }).collect();
    while text.contains("  ") {
        text = text.replace("  ", " ");
    }
    for prefix in ["answer is:", "answer:", "answer is", "option is"] {
        let Some(at) = text.find(prefix) else { continue };
        // One character, a space as a rule, is between prefix and answer.
        let mut after = text[at + prefix.len()..].chars();
        if after.next().is_none() {
            return false;
        }
        return wanted.iter().any(|w| after.as_str().starts_with(w.as_str()));
    }
    // `word in "ABCD"` of the reference holds for any run of these letters.
    let word = text.split_whitespace().find(|w| "ABCD".contains(w));
    word.is_some_and(is_wanted)
}

/// SCBench's threshold for a function that was repeated.
const SIMILAR: f64 = 0.8;

/// Whether the code in `answer` is nearest to `wanted` among it and `others`, and at least [`SIMILAR`].
///
/// Differs: the reference cuts the first function out of a code block with a parser for each language; here
/// the whole first block counts, so text around the function lowers the similarity.
pub fn function(answer: &str, wanted: &str, others: &[String]) -> bool {
    let code = code_block(answer.trim());
    let similarity = bleu(&code, wanted);
    similarity >= SIMILAR && others.iter().all(|other| other == wanted || bleu(&code, other) <= similarity)
}

/// The inside of the first block fenced by three backquotes at the start of a line, or all of it.
fn code_block(answer: &str) -> String {
    let mut inside: Option<Vec<&str>> = None;
    for line in answer.split_inclusive('\n') {
        match &mut inside {
            None => {
                let tag = line.trim_end().strip_prefix("```");
                if line.ends_with('\n')
                    && tag.is_some_and(|t| t.chars().all(|c| c.is_alphanumeric() || c == '_'))
                {
                    inside = Some(Vec::new());
                }
            }
            Some(lines) if line.starts_with("```") => return lines.concat(),
            Some(lines) => lines.push(line),
        }
    }
    answer.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_blocks_are_found() {
        assert_eq!(code_block("Here:\n```python\ndef f():\n    pass\n```\nDone"), "def f():\n    pass\n");
        assert_eq!(code_block("def f(): pass"), "def f(): pass");
        assert_eq!(code_block("```\nopen"), "```\nopen");
    }

    #[test]
    fn a_function_must_be_the_nearest() {
        let wanted = "def area(w, h): return w * h if w > 0 and h > 0 else 0";
        let other = "def volume(w, h, d): return w * h * d if w > 0 and h > 0 else 0".to_owned();
        let fenced = format!("```python\n{wanted}\n```");
        assert!(function(&fenced, wanted, std::slice::from_ref(&other)));
        assert!(!function(&fenced, &other, &[wanted.to_owned()]));
        assert!(!function("no code", wanted, &[]));
    }
}
