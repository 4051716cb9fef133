#include "comm/relay.h"

#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "base/point.h"
#include "base/status.h"
#include "comm/bootstrap.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm {

namespace {

constexpr std::int64_t kAttemptMs = 5000;
constexpr std::int64_t kPauseMs = 50;
constexpr int kSilenceMs = 8000;
constexpr int kMostHangUps = 20;
constexpr std::size_t kMostAnswer = std::size_t{1} << 30;

}  // namespace

Relay::Relay(const UniqueId& id, int listener, Patience patience)
    : Lobby(id.key, listener, patience), id_(id), handshake_(Handshake::Side::caller, id.key), frames_(kMostAnswer) {
  end_ = Deadline::afterMs(patience_.silentCallerMs);
}

void Relay::bring(const UniqueId& id, const Record& record, Deadline deadline) {
  Relay relay(id, -1, Patience{.lateComersMs = 1});
  relay.alone_ = relay.anyone_ = true;
  relay.end_ = Deadline::never();
  relay.timeout_ = deadline;
  Hello hello;
  hello.record = record;
  relay.frames_.queue(static_cast<std::uint32_t>(RecordFrame::hello), bytesOf(hello));
  relay.begin();
  relay.serve({false});
}

std::string Relay::nameFor(const UniqueId& id, std::uint64_t domain) {
  return keyedName("fusco-relay-", id.key, domain);
}

Deadline Relay::addPolled(std::vector<pollfd>* polled) {
  pollfd own{-1, 0, 0};
  if (phase_ == Phase::connecting) own = {socket_.get(), POLLOUT, 0};
  if (phase_ == Phase::proving) own = {socket_.get(), handshake_.waitsFor(), 0};
  if (phase_ == Phase::open) {
    own = {socket_.get(), static_cast<short>(POLLIN | (frames_.queued() ? POLLOUT : 0)), 0};
  }
  polled->push_back(own);
  if (decided()) return end_;
  return end_.earlier(next_).earlier(progress_).earlier(timeout_);
}

void Relay::onPolled(const pollfd* polled, std::size_t) {
  if (polled[0].revents != 0) proceed();
}

bool Relay::finishTurn() {
  if (decided()) {
    // A success concerns those who are here; with a relay that takes the place of another, some may still be about to
    // say who they are. A failure is told to ranks that come later, too.
    if (code() != 0 || !everyoneHasAnswer()) return end_.passed();
    frames_.queue(static_cast<std::uint32_t>(RecordFrame::told), {});
    frames_.flush(socket_.get());
    return true;
  }
  if (!anyone_) return end_.passed();
  if (empty() && !alone_) return true;
  if (timeout_.passed()) {
    giveUp(
        Code::remoteError,
        "the meeting place of this id at " + transport::textOf(id_.address) +
            " did not answer within the time-out; look whether the process that opens it (rank 0, or who made the id) "
            "is alive, and whether that address can be reached from here");
  } else if (next_.passed()) {
    if (phase_ == Phase::resting) {
      begin();
    } else if (phase_ == Phase::proving) {
      // Its machine is there; the process may be stopped, or busy. The time-out is the limit.
      next_ = Deadline::never();
    } else if (phase_ == Phase::connecting) {
      retry("no answer", true);
    }
  }
  if (progress_.passed()) {
    if (phase_ != Phase::open) {
      FUSCO_WARN("init has waited for {} s for the meeting place at {}: is the process that opens it started?",
                 (nowNs() - firstCameNs_) / 1000000000, transport::textOf(id_.address));
    }
    progress_ = Deadline::afterMs(60000);
  }
  return false;
}

void Relay::came(Caller* caller, const Record& record) {
  Hello hello;
  hello.record = record;
  if (decided()) {
    // The meeting place counts who has had a success.
    if (code() == 0) frames_.queue(static_cast<std::uint32_t>(RecordFrame::hello), bytesOf(hello));
    return answer(caller);
  }
  if (!anyone_) {
    anyone_ = true;
    end_ = Deadline::never();
    firstCameNs_ = nowNs();
    // The meeting place knows who is missing: its word at the time-out should come first.
    if (record.initTimeoutMs > 0) timeout_ = Deadline::afterMs(record.initTimeoutMs + record.initTimeoutMs / 40 + 500);
    progress_ = Deadline::afterMs(patience_.firstProgressMs);
  }
  caller->rank = record.rank;
  frames_.queue(static_cast<std::uint32_t>(RecordFrame::hello), bytesOf(hello));
  if (phase_ == Phase::resting && next_.isNever()) begin();
  if (phase_ == Phase::open) proceed();
}

void Relay::lost(int rank) {
  frames_.queue(static_cast<std::uint32_t>(RecordFrame::gone), bytesOf(static_cast<std::int32_t>(rank)));
  if (phase_ == Phase::open) proceed();
}

void Relay::starves() {
  const std::string text = starvingText("the process that speaks for the ranks of this machine at init");
  FUSCO_WARN("{}", text);
  giveUp(Code::systemError, text);
  // Who waits at the door sees it close.
  end_ = Deadline::afterNs(0);
}

void Relay::differs(Caller*, std::uint32_t format) {
  // Its head is enough for the meeting place to tell everyone.
  Hello hello;
  hello.format = format;
  frames_.queue(static_cast<std::uint32_t>(RecordFrame::hello), bytesOf(hello));
  if (phase_ == Phase::resting && next_.isNever()) begin();
  if (phase_ == Phase::open) proceed();
  decide(static_cast<int>(Code::invalidUsage),
         "ranks have different versions of FUSCO: a process of this machine speaks format " + std::to_string(format) +
             ", another format " + std::to_string(Hello::kFormat) + "; use one version of the library on all ranks");
  end_ = Deadline::afterMs(patience_.lateComersMs);
}

void Relay::begin() {
  next_ = Deadline::afterMs(kAttemptMs);
  socket_ = transport::beginConnect(id_.address);
  phase_ = Phase::connecting;
  const int error = socket_ ? 0 : errno;
  const bool starving = error == EMFILE || error == ENFILE;
  if (callStarving_.note(starving) > transport::kStarvingNs) return starve();
  if (starving) {
    pause();
  } else if (error != 0) {
    retry(std::strerror(error), error == ECONNREFUSED);
  }
}

// Goes on with whatever the connection is at.
void Relay::proceed() {
  if (phase_ == Phase::connecting) {
    if (const int error = transport::connectResult(socket_.get()); error != 0) {
      return retry(std::strerror(error), error == ECONNREFUSED || error == ETIMEDOUT);
    }
    transport::watchConnection(socket_.get(), kSilenceMs);
    std::uint64_t process[2];
    processIdentity(process);
    handshake_.restart(Purpose::ofProcess(process[0]));
    phase_ = Phase::proving;
  }
  if (phase_ == Phase::proving) {
    switch (handshake_.step(socket_.get())) {
      case Handshake::Result::again:
        return;
      case Handshake::Result::taken:
        break;
      default:
        // Or it had to make room for others, or has waited for too long while this process was stopped.
        if (++hangUps_ <= kMostHangUps) return pause();
        return retry("who listens there does not hold the id's key", true);
    }
    phase_ = Phase::open;
    next_ = Deadline::never();
  }
  Frames::State state = frames_.flush(socket_.get());
  int error = 0;
  if (state == Frames::State::open) {
    state = frames_.receive(
        socket_.get(), [this](std::uint32_t kind, std::string_view body) { hear(kind, body); }, &error);
  }
  if (state == Frames::State::open) return;
  if (decided()) {
    socket_.reset();
    phase_ = Phase::over;
    return;
  }
  giveUp(Code::remoteError, "the meeting place of this id at " + transport::textOf(id_.address) +
                                " hung up during init" +
                                (error != 0 ? std::string(" (") + std::strerror(error) + ")" : "") +
                                "; the process that opened it has ended, look at its log");
}

void Relay::pause() {
  socket_.reset();
  phase_ = Phase::resting;
  next_ = Deadline::afterMs(kPauseMs);
}

// With an agreed address the place may open, or make room for the next init, at any time.
void Relay::retry(const std::string& why, bool mayStillCome) {
  if (mayStillCome && (id_.flags & UniqueId::kByAddress) != 0) return pause();
  giveUp(
      Code::remoteError,
      "the meeting place of this id at " + transport::textOf(id_.address) + " cannot be reached: " + why +
          "; the process that made the id has ended, the id has been used (it serves one init only), or the address is "
          "of a network that this machine does not see (FUSCO_SOCKET_IFNAME chooses another)");
}

void Relay::hear(std::uint32_t kind, std::string_view body) {
  AnswerHead head;
  if (kind != static_cast<std::uint32_t>(RecordFrame::answer) || body.size() < sizeof(head)) return;
  std::memcpy(&head, body.data(), sizeof(head));
  if (head.magic != Hello::kMagic || head.bytes != body.size() - sizeof(head)) return;
  passPoint("answer", 0);
  // Callers take a system error for one of this process.
  const int answer = head.code == static_cast<int>(Code::systemError) ? static_cast<int>(Code::remoteError) : head.code;
  decide(answer, std::string(body.substr(sizeof(head))));
  phase_ = Phase::over;
  end_ = Deadline::afterMs(patience_.lateComersMs);
}

void Relay::giveUp(Code code, const std::string& text) {
  socket_.reset();
  phase_ = Phase::over;
  decide(static_cast<int>(code), text);
  end_ = Deadline::afterMs(patience_.lateComersMs);
}

}  // namespace fusco::comm
