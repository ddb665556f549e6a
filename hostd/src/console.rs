//! `GET /v1/vms/{vm}/console`: the guest's serial console as raw bytes over an upgraded HTTP/1.1 connection, from any
//! host: where the guest runs elsewhere, this host joins the two ends over mutual TLS.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Path as UrlPath;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::Response;
use hostd_api::CONSOLE_PROTOCOL;
use hostd_api::Problem;
use hostd_api::find;
use hostd_api::problem::Code;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::BufReader;
use tokio::net::UnixStream;
use vmm_control::protocol::Call;

use crate::agent::vmm_client::raw_stream;
use crate::api::Asked;
use crate::api::Failure;
use crate::auth::Caller;
use crate::auth::Right;
use crate::member::Member;

/// How often an open console is checked against revoked tokens and removed hosts.
const RECHECK: Duration = Duration::from_secs(5);

/// The console of a running VM. Ask with `Connection: Upgrade` and `Upgrade: quorate-console`; after the 101, bytes.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", tag = "vms", params(("vm" = String, Path, description = "Name or id")),
    responses((status = 101, description = "Raw bytes in both directions follow"), (status = "default", body = Problem)))]
pub async fn open(asked: Asked, UrlPath(name): UrlPath<String>, mut request: Request) -> Result<Response, Failure> {
    let Asked { member, caller } = asked;
    // A host asks for somebody whom it has let in itself.
    let is_host = matches!(caller, Caller::Host(_));
    let right = if is_host { Right::Look } else { Right::Administer };
    caller.require(right)?;
    let wanted = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if !wanted.is_some_and(|protocol| protocol.eq_ignore_ascii_case(CONSOLE_PROTOCOL)) {
        let problem = Problem::new(Code::BadRequest, "a console is an upgraded connection");
        let problem = problem.action(format!("send `Connection: Upgrade` and `Upgrade: {CONSOLE_PROTOCOL}`"));
        return Err(Problem { status: StatusCode::UPGRADE_REQUIRED.as_u16(), ..problem }.into());
    }
    let fold = member.fold();
    let vm = find::vm(&fold.state, &name).map_err(|rejection| Problem::from(&rejection))?;
    let permit = fold.state.vms.get(&vm).and_then(|vm| vm.permit).ok_or_else(|| {
        Problem::new(Code::NotRunning, format!("vm {name} does not run")).action(format!("`quorate vm start {name}`"))
    })?;
    let upgrade = hyper::upgrade::on(&mut request);
    if permit.host == member.own() {
        let socket = member.work().and_then(|work| work.agent.console_socket(vm));
        let socket = socket.ok_or_else(|| not_there("its process does not run".to_owned()))?;
        let guest = attach(&socket).await?;
        tokio::spawn(join_ends(member, caller, right, upgrade, guest));
    } else if is_host {
        // Asked by a host that saw the VM here: it moved, and a second hop might circle.
        let words = format!("vm {name} does not run on this host any more");
        return Err(Problem::new(Code::Retry, words).action("ask again").into());
    } else {
        let peers = member.peers();
        let path = format!("/v1/vms/{vm}/console");
        let guest = peers.upgraded(&fold, permit.host, &path, CONSOLE_PROTOCOL).await?;
        tokio::spawn(join_ends(member, caller, right, upgrade, guest));
    }
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, CONSOLE_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Turns a connection to the vmm into the guest's console.
async fn attach(socket: &Path) -> Result<BufReader<UnixStream>, Problem> {
    raw_stream(socket, Call::ConsoleAttach).await.map_err(|error| not_there(error.to_string()))
}

fn not_there(why: String) -> Problem {
    let problem = Problem::new(Code::NotRunning, format!("the console cannot be reached: {why}"));
    problem.action("the VM may be starting or ending; try again in a second")
}

/// Carries bytes until either end closes or the caller may not go on.
async fn join_ends(
    member: Arc<Member>,
    caller: Caller,
    right: Right,
    upgrade: hyper::upgrade::OnUpgrade,
    mut guest: impl AsyncRead + AsyncWrite + Unpin,
) {
    let mut person = match upgrade.await {
        Ok(upgraded) => TokioIo::new(upgraded),
        Err(error) => {
            tracing::debug!(%error, "a console was asked for and not taken");
            return;
        }
    };
    let allowed = async {
        loop {
            tokio::time::sleep(RECHECK).await;
            if let Err(problem) = member.still(caller, right) {
                return problem;
            }
        }
    };
    tokio::select! {
        copied = tokio::io::copy_bidirectional(&mut person, &mut guest) => {
            if let Err(error) = copied {
                tracing::debug!(%error, "a console ended");
            }
        }
        problem = allowed => tracing::info!(why = problem.detail, "a console was closed"),
        () = member.cancel().cancelled() => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncBufReadExt;
    use tokio::io::AsyncReadExt;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixListener;
    use vmm_control::protocol::ErrorCode;
    use vmm_control::protocol::Message;
    use vmm_control::protocol::Notice;
    use vmm_control::protocol::Reply;
    use vmm_control::protocol::Request as VmmRequest;

    use super::*;

    /// A vmm that answers one request with these bytes, then echoes.
    fn vmm(answer: Vec<u8>) -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            stream.read_until(b'\n', &mut line).await.unwrap();
            assert_eq!(VmmRequest::decode(&line).unwrap().call, Call::ConsoleAttach);
            stream.write_all(&answer).await.unwrap();
            let mut byte = [0];
            while stream.read_exact(&mut byte).await.is_ok() {
                stream.write_all(&byte).await.unwrap();
            }
        });
        (directory, path)
    }

    #[tokio::test]
    async fn what_the_guest_says_with_the_reply_is_not_lost() {
        let mut answer = Message::Notice(Notice::Resumed).encode();
        answer.extend(Message::Reply(Reply::ok(1, ())).encode());
        answer.extend(b"login: ");
        let (_directory, path) = vmm(answer);
        let mut console = attach(&path).await.unwrap();
        console.write_all(b"root\n").await.unwrap();
        let mut seen = [0; 12];
        console.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"login: root\n");
    }

    #[tokio::test]
    async fn a_console_that_is_not_there_is_a_problem_in_words() {
        let refused = Message::Reply(Reply::error(1, ErrorCode::NotNow, "the guest is ending")).encode();
        for (answer, words) in [(refused, "the guest is ending"), (b"nonsense\n".to_vec(), "request")] {
            let (_directory, path) = vmm(answer);
            let problem = attach(&path).await.unwrap_err();
            assert!(problem.is(Code::NotRunning) && problem.detail.contains(words), "{problem:?}");
        }
        let problem = attach(Path::new("/nonexistent/control.sock")).await.unwrap_err();
        assert!(problem.is(Code::NotRunning) && problem.action.is_some());
    }
}
