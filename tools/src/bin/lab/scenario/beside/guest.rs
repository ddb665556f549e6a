//! What this program does inside a guest of the story: requests to its disk, and bytes to its host. It comes into the guest on
//! the disk, so that the guest's own image is the one that every story boots.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rand::Rng;
use rustix::fs::OFlags;

use super::figures::Figures;
use super::figures::Measure;

/// Where on the disk this program is; the disk before it is written to.
pub const PROGRAM_AT_MIB: u64 = 64;
const BLOCK_BYTES: usize = 4096;
/// The first blocks are the guest's own: it writes a stamp there every second.
const FIRST_BLOCK: u64 = 256;
const LAST_BLOCK: u64 = (PROGRAM_AT_MIB << 20) / BLOCK_BYTES as u64;
const SEGMENT_BYTES: usize = 64 << 10;
/// Before the figures in what the program prints, so that they are found among a console's other lines.
pub const ANSWER: &str = "beside-figures ";

#[derive(Debug, clap::Subcommand)]
pub enum InGuestTask {
    /// Read and write 4 KiB of a disk past the page cache, one request at a time.
    Blocks {
        #[arg(long)]
        device: PathBuf,
        /// For each of the four patterns.
        #[arg(long)]
        seconds: u64,
    },
    /// Send bytes over TCP.
    Send {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        seconds: u64,
    },
}

pub fn perform(task: &InGuestTask) -> Result<String> {
    match task {
        InGuestTask::Blocks { device, seconds } => {
            Ok(format!("{ANSWER}{}", serde_json::to_string(&blocks(device, *seconds)?)?))
        }
        InGuestTask::Send { to, seconds } => {
            send(*to, *seconds)?;
            Ok("sent".to_owned())
        }
    }
}

/// Aligned as O_DIRECT asks for.
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

fn blocks(device: &Path, seconds: u64) -> Result<Figures> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32);
    let disk = options.open(device).with_context(|| format!("open {}", device.display()))?;
    let mut block = Box::new(Block([0x5a; BLOCK_BYTES]));
    let mut random = rand::rng();
    let mut figures = Figures::new();
    for (measure, write, shuffled) in [
        (Measure::SequentialReads, false, false),
        (Measure::RandomReads, false, true),
        (Measure::SequentialWrites, true, false),
        (Measure::RandomWrites, true, true),
    ] {
        let begun = Instant::now();
        let mut count = 0u64;
        while begun.elapsed() < Duration::from_secs(seconds) {
            let next = if shuffled { random.random_range(FIRST_BLOCK..LAST_BLOCK) } else { in_order(count) };
            let at = next * BLOCK_BYTES as u64;
            match write {
                true => disk.write_all_at(&block.0, at),
                false => disk.read_exact_at(&mut block.0, at),
            }
            .with_context(|| format!("4 KiB at {at} of {}", device.display()))?;
            count += 1;
        }
        figures.insert(measure, count as f64 / begun.elapsed().as_secs_f64());
    }
    Ok(figures)
}

/// One block after the other, and from the beginning again.
fn in_order(count: u64) -> u64 {
    FIRST_BLOCK + count % (LAST_BLOCK - FIRST_BLOCK)
}

fn send(to: SocketAddr, seconds: u64) -> Result<()> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    let segment = vec![0; SEGMENT_BYTES];
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(seconds) {
        stream.write_all(&segment).context("send")?;
    }
    Ok(())
}

/// The figures in what a guest's console said.
pub fn figures_in(said: &str) -> Result<Figures> {
    let line = said.lines().find_map(|line| line.split_once(ANSWER)).map(|(_, figures)| figures.trim());
    let figures: Figures = serde_json::from_str(line.with_context(|| format!("no figures in {said:?}"))?)?;
    ensure!(!figures.is_empty(), "no figures in {said:?}");
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_between_the_guests_stamp_and_this_program() {
        let span = LAST_BLOCK - FIRST_BLOCK;
        assert_eq!((in_order(0), in_order(span - 1), in_order(span)), (FIRST_BLOCK, LAST_BLOCK - 1, FIRST_BLOCK));
        assert_eq!(LAST_BLOCK * BLOCK_BYTES as u64, PROGRAM_AT_MIB << 20);
    }

    #[test]
    fn figures_are_found_among_the_lines_of_a_console() {
        let said = "counter boot=ab n=3\r\nbeside-figures {\"random_reads\":812.5}\r\nsh exit 0\r\n";
        assert_eq!(figures_in(said).expect("figures"), Figures::from([(Measure::RandomReads, 812.5)]));
        figures_in("open /dev/vda: no such device").expect_err("an error is no figure");
    }
}
