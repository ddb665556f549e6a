//! A client that speaks frames by hand, over a pair of sockets.

use std::time::Duration;

use super::*;

const HOST: HostId = HostId(1);
const SIZE: u64 = 1 << 20;
/// Far longer than anything takes here; only a failure waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

/// A disk, its host's power, and one client that has chosen the disk.
struct Fixture {
    disk: Arc<Export>,
    power: watch::Sender<Incarnation>,
    client: Client,
    _directory: tempfile::TempDir,
}

struct Client {
    stream: UnixStream,
    server: tokio::task::JoinHandle<Result<()>>,
}

impl Fixture {
    async fn connected() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let disk = Arc::new(Export::open("disk", &directory.path().join("disk"), SIZE, false).expect("a disk"));
        let power = watch::channel(1).0;
        let client = Client::connect(&disk, &power).await.choosing("disk").await;
        Self { disk, power, client, _directory: directory }
    }

    fn lose_power(&self) {
        self.power.send_modify(|number| *number += 1);
        self.disk.lose_power(HOST);
    }

    /// A second client, as after power came back.
    async fn reconnected(&self) -> Client {
        Client::connect(&self.disk, &self.power).await.choosing("disk").await
    }
}

impl Client {
    async fn connect(disk: &Arc<Export>, power: &watch::Sender<Incarnation>) -> Self {
        let (mut stream, theirs) = UnixStream::pair().expect("a pair of sockets");
        let exports = BTreeMap::from([("disk", Arc::clone(disk))]);
        let server = tokio::spawn(serve(HOST, theirs, exports, power.subscribe()));
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.expect("a greeting");
        stream.write_all(&3u32.to_be_bytes()).await.expect("flags");
        Self { stream, server }
    }

    /// Sends GO; answers the kinds of the replies up to the last.
    async fn go(&mut self, name: &str) -> Vec<u32> {
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        let option = [&b"IHAVEOPT"[..], &7u32.to_be_bytes(), &(data.len() as u32).to_be_bytes(), &data].concat();
        self.stream.write_all(&option).await.expect("an option");
        let mut kinds = Vec::new();
        loop {
            let mut header = [0; 20];
            self.stream.read_exact(&mut header).await.expect("a reply");
            let kind = u32::from_be_bytes(header[12..16].try_into().expect("four bytes"));
            let length = u32::from_be_bytes(header[16..].try_into().expect("four bytes"));
            self.stream.read_exact(&mut vec![0; length as usize]).await.expect("its data");
            kinds.push(kind);
            if kind != proto::REPLY_INFO {
                return kinds;
            }
        }
    }

    async fn choosing(mut self, name: &str) -> Self {
        assert_eq!(self.go(name).await, [proto::REPLY_INFO, proto::REPLY_INFO, proto::REPLY_ACK]);
        self
    }

    async fn send(&mut self, kind: u16, offset: u64, length: u32, data: &[u8]) {
        let mut request = [&0x2560_9513u32.to_be_bytes()[..], &[0, 0], &kind.to_be_bytes()].concat();
        request.extend_from_slice(&7u64.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&length.to_be_bytes());
        request.extend_from_slice(data);
        self.stream.write_all(&request).await.expect("a request");
    }

    /// The error number of the next reply.
    async fn reply(&mut self) -> u32 {
        let mut header = [0; 16];
        tokio::time::timeout(PATIENCE, self.stream.read_exact(&mut header)).await.expect("in time").expect("a reply");
        u32::from_be_bytes(header[4..8].try_into().expect("four bytes"))
    }

    async fn write(&mut self, offset: u64, letter: u8) -> u32 {
        self.send(WRITE, offset, 512, &[letter; 512]).await;
        self.reply().await
    }

    async fn flush(&mut self) -> u32 {
        self.send(FLUSH, 0, 0, &[]).await;
        self.reply().await
    }

    async fn read(&mut self, offset: u64) -> u8 {
        self.send(READ, offset, 512, &[]).await;
        assert_eq!(self.reply().await, 0);
        let mut data = [0; 512];
        self.stream.read_exact(&mut data).await.expect("data");
        data[0]
    }

    async fn ended(self) -> Result<()> {
        tokio::time::timeout(PATIENCE, self.server).await.expect("in time").expect("no panic")
    }
}

#[tokio::test]
async fn power_loss_ends_the_connection_and_keeps_what_was_flushed() {
    let mut lab = Fixture::connected().await;
    assert_eq!(lab.client.write(0, b'a').await, 0);
    assert_eq!(lab.client.flush().await, 0);
    assert_eq!(lab.client.write(512, b'b').await, 0);
    assert_eq!((lab.client.read(0).await, lab.client.read(512).await), (b'a', b'b'));
    lab.lose_power();
    let mut after = lab.reconnected().await;
    assert_eq!((after.read(0).await, after.read(512).await), (b'a', 0));
    lab.client.ended().await.expect("an orderly end");
}

#[tokio::test]
async fn a_hanging_disk_answers_after_it_heals() {
    let mut lab = Fixture::connected().await;
    lab.disk.hang(HOST, true);
    lab.client.send(WRITE, 0, 512, &[b'a'; 512]).await;
    // An answer would be here at once; that none came is what a short wait can show.
    let mut byte = [0];
    let silent = tokio::time::timeout(Duration::from_millis(100), lab.client.stream.read(&mut byte)).await;
    assert!(silent.is_err(), "a hanging disk must not answer");
    lab.disk.hang(HOST, false);
    assert_eq!(lab.client.reply().await, 0);
    assert_eq!(lab.client.read(0).await, b'a');
}

#[tokio::test]
async fn a_write_that_hung_when_power_was_lost_never_happens() {
    let mut lab = Fixture::connected().await;
    lab.disk.hang(HOST, true);
    lab.client.send(WRITE, 0, 512, &[b'a'; 512]).await;
    lab.lose_power();
    let mut after = lab.reconnected().await;
    assert_eq!(after.read(0).await, 0);
    lab.client.ended().await.expect("an orderly end");
    assert_eq!(after.read(0).await, 0);
}

#[tokio::test]
async fn requests_outside_the_disk_are_refused_and_the_connection_goes_on() {
    let mut lab = Fixture::connected().await;
    lab.client.send(READ, SIZE, 512, &[]).await;
    assert_eq!(lab.client.reply().await, ReplyError::Invalid as u32);
    lab.client.send(99, 0, 0, &[]).await;
    assert_eq!(lab.client.reply().await, ReplyError::Unsupported as u32);
    assert_eq!(lab.client.write(0, b'a').await, 0);
}

#[tokio::test]
async fn a_frame_that_is_none_ends_the_connection_in_words() {
    let mut lab = Fixture::connected().await;
    lab.client.stream.write_all(&[0; 28]).await.expect("bytes");
    let error = lab.client.ended().await.expect_err("a refusal");
    assert_eq!(error.to_string(), "request magic 0x0 is wrong");
}

#[tokio::test]
async fn an_unknown_export_is_refused_and_a_known_one_can_follow() {
    let lab = Fixture::connected().await;
    let mut client = Client::connect(&lab.disk, &lab.power).await;
    assert_eq!(client.go("nothing").await, [proto::ERROR_UNKNOWN]);
    let mut client = client.choosing("disk").await;
    assert_eq!(client.read(0).await, 0);
}
