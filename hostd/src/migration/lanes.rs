//! One stream of bytes over several connections: a guest's memory is more than one connection's processor, window or network card
//! carries.
//!
//! ```text
//!            spread                                            gather
//!  vmm ──► records 0 1 2 3 … ──► lane 0: 0 3 4 … end ──► at most WINDOW ahead ──► 0 1 2 3 … ──► vmm
//!                            └─► lane 1: 1 2 5 … end ──►
//! record   number u64 | length u32 | bytes
//! end      how many records there were u64 | 0 u32
//! ```
//!
//! Numbers are little endian. A lane takes the next record when it has room for one, so a slow lane takes fewer; its numbers only grow.
//! Lanes are of one migration and authenticated by their own TLS, but what comes over them is bounded and checked as from a stranger:
//! a record that is missing, comes twice or is too long ends the stream, and the guest then stays where it is.

use std::collections::BTreeMap;
use std::io;
use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;
use bytes::BytesMut;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::io::ReadHalf;
use tokio::io::WriteHalf;
use tokio::io::copy;
use tokio::io::sink;
use tokio::io::split;
use tokio::sync::Mutex;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// More would only divide the same processors.
pub const MAX_LANES: u16 = 16;
/// Of one record at most.
const RECORD_BYTES: usize = 256 << 10;
/// So many records may be held for one that is still to come: 8 MiB.
const WINDOW: u64 = 32;
const HEAD_BYTES: usize = 12;
/// What the other end says back is not for us, and little.
const ANSWERS_MAX: u64 = 64 << 10;

/// A record on its way to a lane; the end goes once to each.
enum Piece {
    Record { number: u64, bytes: Bytes },
    End { records: u64 },
}

fn head(number: u64, length: usize) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(&number.to_le_bytes());
    // A record is far shorter than 4 GiB.
    head[8..].copy_from_slice(&(length as u32).to_le_bytes());
    head
}

fn broken(words: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, words.into())
}

/// Sends everything that comes from `input`, and returns when the other end has hung up all lanes after it. Ends at once when it hangs up
/// one before.
pub async fn spread<L>(mut input: impl AsyncRead + Unpin, lanes: Vec<L>) -> io::Result<()>
where
    L: AsyncRead + AsyncWrite + Send + 'static,
{
    let count = lanes.len();
    if count == 0 {
        return Err(broken("a stream needs a lane"));
    }
    let (give, take) = mpsc::channel(1);
    let take = Arc::new(Mutex::new(take));
    // Tasks of their own: encryption is what a lane costs. They are aborted with this future.
    let mut tasks = JoinSet::new();
    for lane in lanes {
        tasks.spawn(send_lane(lane, take.clone()));
    }
    drop(take);
    let cut = async {
        let mut records = 0;
        loop {
            let mut bytes = BytesMut::with_capacity(RECORD_BYTES);
            if (&mut input).take(RECORD_BYTES as u64).read_buf(&mut bytes).await? == 0 {
                break;
            }
            if give.send(Piece::Record { number: records, bytes: bytes.freeze() }).await.is_err() {
                break;
            }
            records += 1;
        }
        for _ in 0..count {
            if give.send(Piece::End { records }).await.is_err() {
                break;
            }
        }
        io::Result::Ok(())
    };
    tokio::pin!(cut);
    let mut is_cut = false;
    loop {
        tokio::select! {
            ended = &mut cut, if !is_cut => {
                is_cut = true;
                ended?;
            }
            lane = tasks.join_next() => match lane {
                Some(lane) => lane.map_err(io::Error::other)??,
                None => return Ok(()),
            },
        }
    }
}

async fn send_lane<L: AsyncRead + AsyncWrite>(lane: L, take: Arc<Mutex<mpsc::Receiver<Piece>>>) -> io::Result<()> {
    let (mut answers, mut out) = split(lane);
    let hung_up = |what: io::Result<u64>| match what {
        Ok(said) if said >= ANSWERS_MAX => broken("the other end talks too much"),
        Ok(_) => io::Error::new(ErrorKind::ConnectionReset, "the other end takes no more"),
        Err(error) => error,
    };
    let mut said = Box::pin(until_it_hangs_up(&mut answers));
    tokio::select! {
        biased;
        sent = send_pieces(&mut out, take) => sent?,
        what = &mut said => return Err(hung_up(what)),
    }
    // All of it is out, and other lanes may not be so far: how this one is closed says nothing, and what has arrived the target judges.
    let _ = said.await;
    Ok(())
}

async fn until_it_hangs_up<L: AsyncRead>(answers: &mut ReadHalf<L>) -> io::Result<u64> {
    copy(&mut answers.take(ANSWERS_MAX), &mut sink()).await
}

async fn send_pieces<L: AsyncWrite>(out: &mut WriteHalf<L>, take: Arc<Mutex<mpsc::Receiver<Piece>>>) -> io::Result<()> {
    loop {
        let piece = take.lock().await.recv().await;
        match piece {
            Some(Piece::Record { number, bytes }) => {
                out.write_all(&head(number, bytes.len())).await?;
                out.write_all(&bytes).await?;
                out.flush().await?;
            }
            Some(Piece::End { records }) => {
                out.write_all(&head(records, 0)).await?;
                return out.shutdown().await;
            }
            None => return Err(io::Error::new(ErrorKind::UnexpectedEof, "the stream broke off")),
        }
    }
}

/// Puts together what [`spread`] sent, in its order, and returns when all of it is in `output`. What is in there after an error is the
/// beginning of it.
pub async fn gather<L>(lanes: Vec<L>, output: &mut (impl AsyncWrite + Unpin)) -> io::Result<()>
where
    L: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    if lanes.is_empty() {
        return Err(broken("a stream needs a lane"));
    }
    let (give, mut take) = mpsc::channel(1);
    let mut due = 0;
    let (next, _) = watch::channel(due);
    let mut tasks = JoinSet::new();
    for lane in lanes {
        tasks.spawn(receive_lane(lane, give.clone(), next.subscribe()));
    }
    drop(give);
    let mut early: BTreeMap<u64, Bytes> = BTreeMap::new();
    let mut ends = Vec::new();
    loop {
        tokio::select! {
            biased;
            Some((number, bytes)) = take.recv() => {
                if number < due || early.insert(number, bytes).is_some() {
                    return Err(broken(format!("record {number} came twice")));
                }
                while let Some(bytes) = early.remove(&due) {
                    output.write_all(&bytes).await?;
                    due += 1;
                    next.send_replace(due);
                }
            }
            lane = tasks.join_next() => match lane {
                Some(lane) => ends.push(lane.map_err(io::Error::other)??),
                None => break,
            },
        }
    }
    if !early.is_empty() || ends.iter().any(|records| *records != due) {
        return Err(broken(format!(
            "{due} records came in their order, and the lanes count {ends:?}: some are missing"
        )));
    }
    output.flush().await
}

/// Hands out the records of one lane, and returns how many it says that there were in all.
async fn receive_lane(
    mut lane: impl AsyncRead + AsyncWrite + Unpin,
    give: mpsc::Sender<(u64, Bytes)>,
    mut next: watch::Receiver<u64>,
) -> io::Result<u64> {
    let mut least = 0;
    let broke_off = |error: io::Error, least: u64| match error.kind() {
        ErrorKind::UnexpectedEof => {
            io::Error::new(error.kind(), format!("a lane broke off before record {least} or a later one"))
        }
        _ => error,
    };
    loop {
        let number = lane.read_u64_le().await.map_err(|error| broke_off(error, least))?;
        let length = lane.read_u32_le().await? as usize;
        if length == 0 {
            // Who sent it may be gone: it needs no answer.
            let _ = lane.shutdown().await;
            return Ok(number);
        }
        if length > RECORD_BYTES {
            return Err(broken(format!("record {number} says that it has {length} bytes; the most is {RECORD_BYTES}")));
        }
        if number < least {
            return Err(broken(format!("record {number} comes where {least} was the least")));
        }
        least = number.saturating_add(1);
        // The one that is due is always let in, and lanes only count up: nobody waits for ever.
        if next.wait_for(|next| number.saturating_sub(*next) < WINDOW).await.is_err() {
            return Err(broken("the stream was given up"));
        }
        let mut bytes = BytesMut::with_capacity(length);
        let mut rest = (&mut lane).take(length as u64);
        while bytes.len() < length {
            if rest.read_buf(&mut bytes).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        if give.send((number, bytes.freeze())).await.is_err() {
            return Err(broken("the stream was given up"));
        }
    }
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
