//! A guest's agent as a test wants it: the far end of a stream, which reads requests and says what the test says.

use serde_json::Value;
use serde_json::json;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::io::DuplexStream;

use super::wire::MARK;

pub struct FakeGuest {
    stream: BufReader<DuplexStream>,
}

/// A stream for a client, and the guest at its other end.
pub fn pair() -> (DuplexStream, FakeGuest) {
    let (near, far) = tokio::io::duplex(16 << 10);
    (near, FakeGuest { stream: BufReader::new(far) })
}

impl FakeGuest {
    /// The next request, or `None` when the client is gone. Marks before it are skipped, as an agent does.
    pub async fn try_request(&mut self) -> Option<Value> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).await.ok().filter(|count| *count > 0)?;
        let request = line.rsplit(|byte| *byte == MARK).next().unwrap_or_default();
        Some(serde_json::from_slice(request).expect("a request is JSON"))
    }

    pub async fn request(&mut self) -> Value {
        self.try_request().await.expect("the client asks")
    }

    /// The next request is this command.
    pub async fn expect(&mut self, command: &str) -> Value {
        let request = self.request().await;
        assert_eq!(request["execute"], command, "{request}");
        request["arguments"].clone()
    }

    pub async fn say(&mut self, bytes: &[u8]) {
        // A client that has left does not care.
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    pub async fn answer(&mut self, value: Value) {
        self.say(format!("{}\n", json!({ "return": value })).as_bytes()).await;
    }

    pub async fn refuse(&mut self, words: &str) {
        let error = json!({ "error": { "class": "GenericError", "desc": words } });
        self.say(format!("{error}\n").as_bytes()).await;
    }

    pub async fn answer_sync(&mut self, arguments: &Value) {
        let mut line = vec![MARK];
        line.extend(format!("{}\n", json!({ "return": arguments["id"] })).as_bytes());
        self.say(&line).await;
    }

    pub async fn sync(&mut self) {
        let arguments = self.expect("guest-sync-delimited").await;
        self.answer_sync(&arguments).await;
    }

    /// A sync, and the command after it.
    pub async fn sync_then(&mut self, command: &str) -> Value {
        self.sync().await;
        self.expect(command).await
    }
}
