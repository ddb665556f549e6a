//! What goes in comes out, in its order, or an error says that it did not.

use proptest::prelude::*;
use tokio::io::DuplexStream;
use tokio::io::duplex;

use super::*;

/// Both ends of some lanes with little room, so that they wait for each other.
fn lanes(count: usize) -> (Vec<DuplexStream>, Vec<DuplexStream>) {
    (0..count).map(|nth| duplex(700 * (nth + 1))).unzip()
}

fn run<T>(what: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    // The clock is paused: it comes to this at once when nothing else can happen.
    let in_time = async { tokio::time::timeout(std::time::Duration::from_secs(3600), what).await };
    runtime.block_on(in_time).expect("it stands still")
}

fn some_bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| ((at / 7) ^ at) as u8).collect()
}

/// Records as a stranger may send them: numbers and lengths, and an end or none.
fn written(records: &[(u64, usize)], end: Option<u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, length) in records {
        bytes.extend(head(*number, *length));
        bytes.extend(vec![*number as u8; (*length).min(RECORD_BYTES)]);
    }
    bytes.extend(end.map(|records| head(records, 0)).into_iter().flatten());
    bytes
}

/// What comes out of lanes that bring this and end, and why not all of it.
fn gathered(lanes: Vec<Vec<u8>>) -> (Vec<u8>, Result<(), String>) {
    let mut output = Vec::new();
    let lanes: Vec<_> = lanes.into_iter().map(io::Cursor::new).collect();
    let result = run(gather(lanes, &mut output)).map_err(|error| error.to_string());
    (output, result)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_goes_in_comes_out_in_its_order(length in 0usize..600_000, piece in 500usize..40_000, count in 1usize..6) {
        let sent = some_bytes(length);
        let (near, far) = lanes(count);
        let mut got = Vec::new();
        run(async {
            // Small pieces make more records than may be held back.
            let (mut give, input) = duplex(piece);
            let giving = async {
                give.write_all(&sent).await.unwrap();
                drop(give);
            };
            let (_, out, came) = tokio::join!(giving, spread(input, near), gather(far, &mut got));
            out.unwrap();
            came.unwrap();
        });
        prop_assert!(got == sent);
    }

    /// Wherever one lane is cut: an error at the far end, and nothing but the beginning of what was sent.
    #[test]
    fn a_lane_that_is_cut_is_an_error_and_what_came_before_is_right(cut in 0u64..600_000, count in 1usize..4) {
        let sent = some_bytes(1 << 20);
        let (near, mut far) = lanes(count);
        let (last, mut got) = (far.pop().unwrap(), Vec::new());
        let (result, whole) = run(async {
            let (spare, short) = duplex(1000);
            far.push(spare);
            let cutter = tokio::spawn(async move {
                let (mut last, mut short) = (last, short);
                copy(&mut (&mut last).take(cut), &mut short).await.is_ok() && last.read(&mut [0]).await.is_ok_and(|more| more == 0)
            });
            let (_, came) = tokio::join!(spread(&sent[..], near), gather(far, &mut got));
            // A lane that brought less than the cut was whole.
            (came, cutter.await.unwrap())
        });
        prop_assert_eq!(&got[..], &sent[..got.len()]);
        prop_assert_eq!(result.is_ok(), whole);
        prop_assert!(!whole || got == sent);
    }
}

#[test]
fn what_a_stranger_sends_is_bounded_and_checked() {
    let good = || written(&[(0, 3), (2, 1)], Some(3));
    let (output, result) = gathered(vec![good(), written(&[(1, 2)], Some(3))]);
    assert_eq!((output, result), (vec![0, 0, 0, 1, 1, 2], Ok(())));
    for (lanes, why) in [
        (vec![good(), written(&[], Some(3))], "1 records came in their order"),
        (vec![good(), written(&[(1, 2)], Some(2))], "some are missing"),
        (vec![good(), written(&[(1, 2)], None)], "broke off before record 2"),
        (vec![], "needs a lane"),
        (vec![good(), written(&[(1, 2), (2, 1)], Some(3))], "record 2 came twice"),
        (vec![good(), written(&[(1, 2), (0, 1)], Some(3))], "record 0 comes where 2 was the least"),
        (vec![written(&[(0, RECORD_BYTES + 1)], Some(1))], "the most is"),
        (vec![written(&[(0, usize::from(u16::MAX) << 16)], Some(1))], "the most is"),
    ] {
        let (_, result) = gathered(lanes);
        let words = result.unwrap_err();
        assert!(words.contains(why), "{words}, not {why}");
    }
}

#[test]
fn a_lane_that_runs_ahead_is_read_as_far_as_the_window_and_goes_on_when_the_others_have_caught_up() {
    let (mut ahead, first) = duplex(100);
    let (mut behind, second) = duplex(100);
    // Longer than what a lane holds on its way.
    let record = |number| written(&[(number, 1000)], None);
    let mut output = Vec::new();
    run(async {
        let sending = async {
            ahead.write_all(&record(WINDOW - 1)).await.unwrap();
            // The clock is paused: time passes when nothing else can happen.
            let early = record(WINDOW);
            let mut beyond = Box::pin(ahead.write_all(&early));
            let soon = std::time::Duration::from_secs(1);
            assert!(tokio::time::timeout(soon, &mut beyond).await.is_err(), "it is beyond the window");
            for number in 0..WINDOW - 1 {
                behind.write_all(&record(number)).await.unwrap();
            }
            beyond.await.unwrap();
            for lane in [&mut ahead, &mut behind] {
                lane.write_all(&head(WINDOW + 1, 0)).await.unwrap();
            }
        };
        tokio::join!(sending, gather(vec![first, second], &mut output)).1.unwrap();
    });
    let order: Vec<u8> = output.chunks(1000).map(|record| record[0]).collect();
    assert_eq!(order, (0..=WINDOW as u8).collect::<Vec<u8>>());
}

#[test]
fn whoever_hangs_up_early_ends_the_stream_though_nothing_is_sent() {
    let (near, far) = lanes(2);
    let (_keeps_quiet, input) = duplex(1);
    let ended = run(async {
        let sending = spread(input, near);
        let hang_up = async {
            tokio::task::yield_now().await;
            drop(far);
        };
        tokio::join!(sending, hang_up).0
    });
    assert!(ended.unwrap_err().to_string().contains("takes no more"));
}

#[test]
fn what_breaks_off_at_its_source_has_no_end() {
    struct Breaks(usize);
    impl AsyncRead for Breaks {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buffer: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            self.0 += 1;
            if self.0 > 3 {
                return std::task::Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
            }
            buffer.put_slice(b"some");
            std::task::Poll::Ready(Ok(()))
        }
    }
    let (near, far) = lanes(2);
    let mut output = Vec::new();
    let (sent, came) = run(async { tokio::join!(spread(Breaks(0), near), gather(far, &mut output)) });
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(came.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert!(b"somesomesome".starts_with(&output[..]));
}
