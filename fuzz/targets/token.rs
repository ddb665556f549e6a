//! The text of a token, as somebody typed it.
#![no_main]

use hostd_api::ApiToken;
use hostd_api::JoinToken;
use hostd_api::cursor::Cursor;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for text in [text.to_owned(), format!("qrt1.{text}"), format!("qra1.{text}")] {
        if let Ok(token) = JoinToken::from_text(&text) {
            assert_eq!(JoinToken::from_text(token.to_text().expose()), Ok(token.clone()), "a token survives being written");
        }
        if let Ok(token) = ApiToken::from_text(&text) {
            assert_eq!(ApiToken::from_text(token.to_text().expose()), Ok(token.clone()), "a token survives being written");
        }
    }
    if let Ok(cursor) = text.parse::<Cursor>() {
        assert_eq!(cursor.to_string().parse(), Ok(cursor), "a cursor survives being written");
    }
});
