//! Pieces of text as tokens come.

use pkv_infer::TextStream;

use crate::support::tokenizer;

#[test]
fn pieces_add_up_to_the_whole_and_never_split_a_character() {
    let tokenizer = tokenizer();
    for text in [
        "The keeper of the tower opens the gate.",
        " naïve café, 12 €, 東京 and 🦀🦀 — «done»\n\n  twice  ",
        "e\u{301} combining, \u{1F469}\u{200D}\u{1F52C} joined",
        "",
    ] {
        let ids = tokenizer.encode(text).unwrap();
        let mut stream = TextStream::new(&tokenizer);
        let mut pieces = String::new();
        for id in &ids {
            let piece = stream.push(*id).unwrap();
            assert!(!piece.contains('\u{fffd}'), "half a character in {piece:?} of {text:?}");
            pieces.push_str(&piece);
        }
        pieces.push_str(&stream.finish().unwrap());
        assert_eq!(pieces, tokenizer.decode(&ids).unwrap());
        assert_eq!(stream.ids(), ids);
    }
}

#[test]
fn an_unfinished_character_comes_at_the_end() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("a🦀").unwrap();
    let mut stream = TextStream::new(&tokenizer);
    let mut pieces = String::new();
    for id in &ids[..ids.len() - 1] {
        pieces.push_str(&stream.push(*id).unwrap());
    }
    assert!(!pieces.contains('\u{fffd}'));
    pieces.push_str(&stream.finish().unwrap());
    assert_eq!(pieces, tokenizer.decode(&ids[..ids.len() - 1]).unwrap());
}
