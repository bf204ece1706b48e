#include "endpoint.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <stdexcept>
#include <system_error>

#include "streams.h"

namespace onclock {
namespace {

// Marks in epoll's data: odd numbers, which no pointer is.
constexpr uint64_t kWake = 1;
constexpr uint64_t kListener = 3;
constexpr int kEvents = 64;
// More are not kept for later: the list is bounded, and whoever handles it has its hands full.
constexpr size_t kHandOver = 1024;
// Waiting takes longer than this only if there was something to wait for.
constexpr int64_t kAtOnceNs = 20000;
constexpr int kAcceptAtOnce = 64;
// After running out of file descriptors, accepting is tried again this often.
constexpr int kAcceptPauseMs = 100;
// While the endpoint ends it looks this often whether all connections are idle.
constexpr int kWindDownMs = 5;
// Connections are looked at this often, for those that are idle or never began.
constexpr int64_t kSweepNs = 1000000000;
// A client that has not finished its handshake, or has not said what HTTP/2 begins with, is not one.
constexpr int64_t kBeginNs = 10 * kSweepNs;
// After being told that its connection ends, a client has this long to end it as well.
constexpr int64_t kEndNs = 10 * kSweepNs;
// Connections that were made together, by clients that were told to go together, do not end together: their ages differ by so much.
constexpr double kAgeSpread = 0.1;

void watch_socket(int epoll, int operation, int fd, uint32_t events, uint64_t data) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = data;
  if (epoll_ctl(epoll, operation, fd, &event) < 0 && operation == EPOLL_CTL_ADD)
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
}

}  // namespace

Endpoint::Endpoint(std::vector<int> listeners, std::string method, std::string upstream_path, Limits limits,
                   Refusal unseen)
    : limits(limits),
      method(std::move(method)),
      listeners_(std::move(listeners)),
      upstream_path_(std::move(upstream_path)),
      unseen_(std::move(unseen)),
      read_buffer_(kReadSize) {
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  wake_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (epoll_ < 0 || wake_ < 0) throw std::system_error(errno, std::generic_category(), "epoll or eventfd");
  watch_socket(epoll_, EPOLL_CTL_ADD, wake_, EPOLLIN, kWake);
  for (size_t i = 0; i < listeners_.size(); i++) {
    fcntl(listeners_[i], F_SETFL, fcntl(listeners_[i], F_GETFL) | O_NONBLOCK);
    watch_socket(epoll_, EPOLL_CTL_ADD, listeners_[i], EPOLLIN, kListener + 2 * i);
  }
}

Endpoint::~Endpoint() {
  while (!channels_.empty()) destroy(*channels_.back());
  for (Channel *channel : graveyard_) delete channel;
  for (int listener : listeners_) ::close(listener);
  if (wake_ >= 0) ::close(wake_);
  if (epoll_ >= 0) ::close(epoll_);
}

Polled Endpoint::poll(int64_t look_ns, int64_t hand_over_ns, double share) {
  poller_.store(pthread_self(), std::memory_order_relaxed);
  if (waiting_.load(std::memory_order_relaxed)) flush();
  const int64_t hand_over_at_ns = hand_over_ns > 0 ? now_ns() + hand_over_ns : 0;
  bool pacing = hand_over_ns > 0;
  pacing_.store(pacing);
  epoll_event events[kEvents];
  for (;;) {
    if (pacing) {
      const int64_t left_ns = hand_over_at_ns - now_ns();
      const int64_t pause_ns = std::min(look_ns, left_ns);
      pollfd hurry{wake_, POLLIN, 0};
      const timespec pause{time_t(pause_ns / 1000000000), long(pause_ns % 1000000000)};
      if (left_ns <= look_ns || ppoll(&hurry, 1, &pause, nullptr) != 0) pacing = false;
    }
    const int timeout_ms = pacing || !now_.empty() ? 0
                           : stopping_              ? kWindDownMs
                           : accept_paused_         ? kAcceptPauseMs
                           : connections            ? int(kSweepNs / 1000000)
                                                    : -1;
    const int64_t before_ns = now_ns();
    const int count = epoll_wait(epoll_, events, kEvents, timeout_ms);
    const int64_t after_ns = now_ns();
    std::lock_guard<std::mutex> guard(lock);
    const size_t known = now_.arrived.size();
    share_ = share;
    if (accept_paused_) {
      accept_paused_ = false;
      for (size_t i = 0; i < listeners_.size(); i++)
        watch_socket(epoll_, EPOLL_CTL_MOD, listeners_[i], EPOLLIN, kListener + 2 * i);
    }
    for (int i = 0; i < count; i++) {
      const uint64_t data = events[i].data.u64;
      if (data == kWake) {
        uint64_t ignored;
        (void)!::read(wake_, &ignored, sizeof ignored);
      } else if (data & 1) {
        if (!announced_) accept_from(listeners_[(data - kListener) / 2]);
      } else {
        Channel &channel = *static_cast<Channel *>(events[i].data.ptr);
        if (channel.dead) continue;
        if (events[i].events & EPOLLOUT) mark(channel);
        if ((events[i].events & ~uint32_t(EPOLLOUT)) && !channel.read()) destroy(channel);
      }
    }
    date(known, after_ns - before_ns < kAtOnceNs ? looked_ns_ : after_ns, after_ns);
    looked_ns_ = after_ns;
    drain_answers();
    write_all();
    if (after_ns >= sweep_ns_) sweep(after_ns);
    if (stopping_) wind_down();
    for (Channel *channel : graveyard_) delete channel;
    graveyard_.clear();
    // A cancelled request is not left in the queue for long.
    if (!now_.cancelled.empty()) pacing = false;
    if (now_.ended || !(pacing || now_.empty()) || now_.arrived.size() >= kHandOver) {
      pacing_.store(false);
      return std::exchange(now_, Polled{});
    }
  }
}

// What was there when we looked came at some time since we last did, in order: taken as evenly spread, the first at once.
void Endpoint::date(size_t first, int64_t from_ns, int64_t to_ns) {
  const auto count = int64_t(now_.arrived.size() - first);
  for (int64_t i = 0; i < count; i++) {
    Call &call = *now_.arrived[first + size_t(i)];
    call.arrival_ns = from_ns + (to_ns - from_ns) / count * i;
    if (call.timeout_ns < kNever - call.arrival_ns) call.deadline_ns = call.arrival_ns + call.timeout_ns;
  }
}

void Endpoint::answer(const CallPtr &call, std::shared_ptr<Answer> answer) {
  std::lock_guard<std::mutex> guard(answers_lock_);
  answers_.emplace_back(call, std::move(answer));
  waiting_.store(true, std::memory_order_relaxed);
}

void Endpoint::flush() {
  std::lock_guard<std::mutex> guard(lock);
  drain_answers();
  write_all();
  if (!now_.cancelled.empty()) {
    // A connection broke while it was written to: the poller has to tell.
    const uint64_t one = 1;
    (void)!::write(wake_, &one, sizeof one);
  }
}

void Endpoint::hurry() {
  if (!pacing_.exchange(false)) return;
  const uint64_t one = 1;
  (void)!::write(wake_, &one, sizeof one);
  // On a shared core the poller would else come to run when the next batch has begun without what it has read.
  sched_yield();
}

void Endpoint::stop(int64_t grace_ns) {
  std::lock_guard<std::mutex> guard(lock);
  stopping_ = true;
  stop_ns_ = now_ns() + grace_ns;
  const uint64_t one = 1;
  (void)!::write(wake_, &one, sizeof one);
}

void Endpoint::drain_answers() {
  std::vector<std::pair<CallPtr, std::shared_ptr<Answer>>> answers;
  {
    std::lock_guard<std::mutex> guard(answers_lock_);
    answers.swap(answers_);
    waiting_.store(false, std::memory_order_relaxed);
  }
  for (auto &[call, answer] : answers) {
    if (!call->connection) continue;  // the client is gone
    auto *stream =
        static_cast<Stream *>(nghttp2_session_get_stream_user_data(call->connection->session, call->stream));
    if (!stream || stream->answer) continue;
    stream->answer = std::move(answer);
    submit_answer(*stream);
    mark(*stream->connection);
  }
}

void Endpoint::write_all() {
  while (!dirty_.empty()) {
    Channel &channel = *dirty_.back();
    dirty_.pop_back();
    channel.dirty = false;
    if (!channel.dead && !channel.write()) destroy(channel);
  }
}

void Endpoint::wind_down() {
  if (!announced_) {
    announced_ = true;
    for (int listener : listeners_) ::close(listener);
    listeners_.clear();
    for (Channel *channel : channels_) {
      if (!dynamic_cast<Connection *>(channel)) continue;
      nghttp2_submit_goaway(channel->session, NGHTTP2_FLAG_NONE,
                            nghttp2_session_get_last_proc_stream_id(channel->session), NGHTTP2_NO_ERROR, nullptr, 0);
      mark(*channel);
    }
    write_all();
  }
  bool any = false;
  for (Channel *channel : channels_) {
    auto *connection = dynamic_cast<Connection *>(channel);
    if (!connection) continue;
    any = true;
    if (!connection->open_streams && !connection->pending()) connection->done();
  }
  if (!any || now_ns() >= stop_ns_) {
    while (!channels_.empty()) destroy(*channels_.back());
    now_.ended = true;
  }
}

void Endpoint::accept_from(int listener) {
  for (int i = 0; i < kAcceptAtOnce; i++) {
    const int fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        // Without a pause, epoll would report the waiting client again and again.
        accept_paused_ = true;
        for (size_t k = 0; k < listeners_.size(); k++)
          watch_socket(epoll_, EPOLL_CTL_MOD, listeners_[k], 0, kListener + 2 * k);
      }
      if (errno == ECONNABORTED || errno == EINTR) continue;
      return;
    }
    if (connections.load(std::memory_order_relaxed) >= limits.max_connections) {
      turned_away.fetch_add(1, std::memory_order_relaxed);
      ::close(fd);
      continue;
    }
    const int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    // A client that vanished without a word is noticed.
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    auto *connection = new Connection(*this, fd);
    if (limits.age_ns) {
      std::uniform_real_distribution<double> spread(1 - kAgeSpread, 1 + kAgeSpread);
      connection->age_step_ns = now_ns() + int64_t(double(limits.age_ns) * spread(random_));
    }
    if (tls_) connection->tls = std::make_unique<Tls>(tls_);
    connections.fetch_add(1, std::memory_order_relaxed);
    channels_.push_back(connection);
    watch_socket(epoll_, EPOLL_CTL_ADD, fd, EPOLLIN, reinterpret_cast<uint64_t>(static_cast<Channel *>(connection)));
    mark(*connection);
  }
}

// Takes a connection that is too old one step further towards its end. False: close it.
bool Endpoint::retire(Connection &connection, int64_t at_ns) {
  switch (connection.age) {
    case Connection::Age::kServing:
      // Calls that are on their way meanwhile are still served.
      nghttp2_submit_shutdown_notice(connection.session);
      connection.age = Connection::Age::kNoticed;
      connection.age_step_ns = at_ns + kSweepNs;
      break;
    case Connection::Age::kNoticed:
      // With its last stream the session ends, and the connection with it.
      nghttp2_submit_goaway(connection.session, NGHTTP2_FLAG_NONE,
                            nghttp2_session_get_last_proc_stream_id(connection.session), NGHTTP2_NO_ERROR, nullptr, 0);
      connection.age = Connection::Age::kTold;
      connection.age_step_ns = at_ns + limits.age_grace_ns;
      break;
    case Connection::Age::kTold:
      return false;
  }
  mark(connection);
  return true;
}

// Connections that are too old, that nobody uses, or that never became one.
void Endpoint::sweep(int64_t at_ns) {
  sweep_ns_ = at_ns + kSweepNs;
  for (size_t i = channels_.size(); i-- > 0;) {
    auto *connection = dynamic_cast<Connection *>(channels_[i]);
    if (!connection) continue;
    if (connection->begun && !connection->half_closed && at_ns >= connection->age_step_ns &&
        !retire(*connection, at_ns)) {
      destroy(*connection);
      i = std::min(i, channels_.size());
      continue;
    }
    if (connection->open_streams) continue;
    const int64_t quiet_ns = at_ns - connection->quiet_ns;
    if (connection->half_closed ? quiet_ns > kEndNs : !connection->begun && quiet_ns > kBeginNs) {
      // An upstream may go with it: channels beyond `i` may move, those below stay.
      destroy(*connection);
      i = std::min(i, channels_.size());
    } else if (limits.idle_ns && !connection->half_closed && connection->begun && quiet_ns > limits.idle_ns) {
      // A client that asks at this very moment is told that its call was not begun, and repeats it on a new connection.
      nghttp2_session_terminate_session(connection->session, NGHTTP2_NO_ERROR);
      connection->quiet_ns = at_ns;
      mark(*connection);
    }
  }
  write_all();
}

void Endpoint::secure(TlsContext context) {
  std::lock_guard<std::mutex> guard(lock);
  if (context && !wire_buffer_.size()) wire_buffer_ = Buffer(kReadSize);
  tls_ = std::move(context);
}

void Endpoint::admit(std::shared_ptr<const Access> access) {
  std::lock_guard<std::mutex> guard(lock);
  access_ = std::move(access);
  access_generation_++;
}

void Endpoint::mark(Channel &channel) {
  if (channel.dirty || channel.dead) return;
  channel.dirty = true;
  dirty_.push_back(&channel);
}

void Endpoint::watch(Channel &channel, bool for_write) {
  if (channel.listed_for_write == for_write) return;
  channel.listed_for_write = for_write;
  watch_socket(epoll_, EPOLL_CTL_MOD, channel.fd, for_write ? EPOLLIN | EPOLLOUT : EPOLLIN,
               reinterpret_cast<uint64_t>(&channel));
}

void Endpoint::destroy(Channel &channel) {
  if (channel.dead) return;
  channel.dead = true;
  channels_.erase(std::find(channels_.begin(), channels_.end(), &channel));
  graveyard_.push_back(&channel);
  if (channel.tls) channel.tls->farewell(channel.fd);
  channel.closed();
  epoll_ctl(epoll_, EPOLL_CTL_DEL, channel.fd, nullptr);
  ::close(channel.fd);
}

// ------------------------------------------------------------------------------------------------- calls of the method

void Endpoint::begin(Stream &stream) {
  if (!stream.served_path) {
    relay(stream);
    return;
  }
  if (!stream.is_post || !stream.is_grpc) {
    stream.kind = Stream::Kind::kRefused;
    refused[size_t(Why::kInvalid)].fetch_add(1, std::memory_order_relaxed);
    submit_http_error(stream, "415");
    return;
  }
  if (access_ && !identify(stream)) return;
  if (calls.load(std::memory_order_relaxed) >= limits.max_calls) {
    refuse(stream, Why::kQueueFull, kUnavailable,
           "Exceeds maximum queue size: " + std::to_string(limits.max_calls) + " calls are in progress", "1");
    return;
  }
  credit_ += share_;
  if (share_ > 0 && credit_ >= 1) {
    credit_ -= 1;
    now_.unseen++;
    refuse(stream, Why::kShare, unseen_.status, unseen_.details, unseen_.pushback);
    return;
  }
  if (stream.encoding == Encoding::kOther) {
    refuse(stream, Why::kUnsupported, kUnimplemented, method + ": grpc-encoding must be identity, gzip or deflate");
    return;
  }
  stream.kind = Stream::Kind::kServed;
  stream.call = std::make_shared<Call>();
  stream.call->connection = stream.connection;
  stream.call->stream = stream.id;
  stream.call->timeout_ns = stream.timeout_ns;
  stream.call->caller = stream.connection->known.caller.number;
  stream.call->trace = std::move(stream.trace);
  calls.fetch_add(1, std::memory_order_relaxed);
}

// Finds out who asks. False: they may not, and have been told.
bool Endpoint::identify(Stream &stream) {
  Known &known = stream.connection->known;
  if (known.generation != access_generation_ || known.credentials != stream.credentials) {
    if (stream.credentials) nghttp2_rcbuf_incref(stream.credentials);
    if (known.credentials) nghttp2_rcbuf_decref(known.credentials);
    known.credentials = stream.credentials;
    known.generation = access_generation_;
    known.caller = access_->anonymous;
    known.found = !stream.credentials;
    Digest digest;
    if (stream.credentials) {
      const nghttp2_vec text = nghttp2_rcbuf_get_buf(stream.credentials);
      if (digest_of(reinterpret_cast<const char *>(text.base), text.len, digest)) {
        const auto found = access_->callers.find(digest);
        if (found != access_->callers.end()) {
          known.caller = found->second;
          known.found = true;
        }
      }
    }
  }
  if (known.found && known.caller.may_infer) return true;
  if (known.found && known.caller.number) {
    refuse(stream, Why::kForbidden, kPermissionDenied, method + ": this API key may not infer");
  } else {
    refuse(stream, Why::kUnauthenticated, kUnauthenticated,
           method + (stream.credentials ? ": the API key is not known" : ": expected an API key in 'authorization: Bearer KEY'"));
  }
  return false;
}

void Endpoint::arrived(CallPtr call) {
  now_.arrived.push_back(std::move(call));
}

void Endpoint::refuse(Stream &stream, Why why, int status, std::string details, std::string pushback) {
  refused[size_t(why)].fetch_add(1, std::memory_order_relaxed);
  if (stream.call) stream.call->taken.store(true);
  stream.kind = Stream::Kind::kRefused;
  stream.answer = std::make_shared<Answer>();
  stream.answer->status = status;
  stream.answer->details = std::move(details);
  stream.answer->pushback = std::move(pushback);
  submit_answer(stream);
  mark(*stream.connection);
}

void Endpoint::ended(Stream &stream) {
  if (!stream.call) return;
  Call &call = *stream.call;
  call.connection = nullptr;
  if (!call.taken.exchange(true) && call.owner) now_.cancelled.push_back(std::exchange(call.owner, nullptr));
  calls.fetch_sub(1, std::memory_order_relaxed);
  bytes.fetch_sub(stream.counted + call.unpacked, std::memory_order_relaxed);
}

bool Endpoint::count(Call &call, size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  if (!call.connection) return true;  // ended: nobody will wait for what is left of it
  if (bytes.load(std::memory_order_relaxed) + size > limits.max_bytes) return false;
  call.unpacked += size;
  bytes.fetch_add(size, std::memory_order_relaxed);
  return true;
}

// ------------------------------------------------------------------------------------------------ everything else

void Endpoint::relay(Stream &stream) {
  stream.kind = Stream::Kind::kRelayed;
  Connection &front = *stream.connection;
  if (!front.upstream) {
    const int fd = connect_unix(upstream_path_);
    if (fd < 0) {
      refuse(stream, Why::kControlPlane, kUnavailable, "the server is stopping or overloaded: its control plane does not answer");
      return;
    }
    front.upstream = new Upstream(*this, fd, &front);
    channels_.push_back(front.upstream);
    watch_socket(epoll_, EPOLL_CTL_ADD, fd, EPOLLIN, reinterpret_cast<uint64_t>(static_cast<Channel *>(front.upstream)));
  }
  submit_relayed(stream);
  mark(*front.upstream);
}

// ------------------------------------------------------------------------------------------------------- channels

Channel::~Channel() { nghttp2_session_del(session); }

void Channel::mark() { endpoint.mark(*this); }

bool Channel::read() {
  // So much from one channel, then it is the next one's turn.
  for (int i = 0; i < 4; i++) {
    char *const to = tls ? endpoint.wire_buffer() : endpoint.read_buffer();
    const ssize_t size = recv(fd, to, Endpoint::kReadSize, MSG_DONTWAIT);
    if (size == 0) return false;
    if (size < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) break;
      return false;
    }
    if (half_closed) continue;
    if (tls) {
      tls->feed(to, size_t(size));
      for (;;) {
        const ssize_t plain = tls->read(endpoint.read_buffer(), Endpoint::kReadSize);
        if (plain == 0) break;
        if (plain < 0 || !take(size_t(plain))) return false;
      }
    } else if (!take(size_t(size))) {
      return false;
    }
    if (size_t(size) < Endpoint::kReadSize) break;
  }
  mark();
  return true;
}

bool Channel::take(size_t size) {
  // Negative: not HTTP/2, a flood, no memory. Other errors of the peer are answered by the session itself.
  return nghttp2_session_mem_recv(session, reinterpret_cast<uint8_t *>(endpoint.read_buffer()), size) >= 0;
}

bool Channel::write() {
  // Frames are made as the socket takes them: what a slow reader has not read waits as answers, not as frames.
  constexpr size_t kHighWater = 1 << 20;
  for (;;) {
    while (out.pending() < kHighWater) {
      const uint8_t *data;
      const ssize_t size = nghttp2_session_mem_send(session, &data);
      if (size < 0) return false;
      if (size == 0) break;
      out.append(data, size_t(size));
    }
    if (!pending()) break;
    if (half_closed || !(tls ? tls->write(out, fd) : out.write(fd))) return false;
    if (pending()) break;
  }
  // Before the end of the handshake there is nothing to wait for but the client.
  const bool shaking = tls && !tls->ready();
  endpoint.watch(*this, shaking ? tls->pending() > 0 : pending() > 0);
  if (pending() || shaking || nghttp2_session_want_read(session) || nghttp2_session_want_write(session)) return true;
  return done();
}

}  // namespace onclock
