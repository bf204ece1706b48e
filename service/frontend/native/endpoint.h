// A gRPC server's connections without Python: one unary method is served by whoever polls, all others are relayed.
//
// Promise: `poll` waits for sockets, reads and writes them, and returns what has arrived in one list. Answers may be
// given from any thread; they leave when `flush` is called or at the next poll. No thread is made here. Nothing here
// calls into Python, and no lock is held while anything waits.
#pragma once

#include <nghttp2/nghttp2.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <iterator>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "access.h"
#include "call.h"
#include "output.h"
#include "tls.h"

namespace onclock {

struct Limits {
  size_t max_message = 0;   // bytes of one message, either way
  size_t max_bytes = 0;     // bytes of the messages of all calls in progress
  long max_calls = 0;       // calls of the served method in progress
  uint32_t max_streams = 0; // concurrent streams of one connection
  long max_connections = 0; // clients' connections
  int64_t idle_ns = 0;      // a connection without streams is closed after that; 0: never
  int64_t age_ns = 0;       // a connection is ended gracefully after about that, in use or not; 0: never
  int64_t age_grace_ns = 0; // what is then in progress may take so long
  bool traced = false;      // calls are told of `traceparent` and `tracestate`
};

// What a call is told that is refused before its message is read.
struct Refusal {
  int status = kUnavailable;
  std::string details;
  std::string pushback;
};

// Why a call ends here, before Python hears of it. All but kShare, which the models count, are counted by `Endpoint`.
enum class Why { kShare, kUnauthenticated, kForbidden, kQueueFull, kInvalid, kUnsupported, kOutOfMemory, kControlPlane };
// Their names in metrics, those of service/errors.py.
constexpr const char *kWhyNames[] = {"",        "unauthenticated", "forbidden",     "queue_full",
                                     "invalid", "unsupported",     "out_of_memory", "control_plane"};

struct Polled {
  std::vector<CallPtr> arrived;
  std::vector<void *> cancelled;  // owners of calls whose stream ended before anybody answered
  long unseen = 0;                // calls refused by the share
  bool ended = false;
  bool empty() const { return arrived.empty() && cancelled.empty() && !unseen && !ended; }
};

class Endpoint;
class Upstream;
struct Stream;

// A socket with an HTTP/2 session on it.
class Channel {
 public:
  Channel(Endpoint &endpoint, int fd) : endpoint(endpoint), fd(fd) {}
  virtual ~Channel();
  Channel(const Channel &) = delete;
  // Reads what is there. False: the channel is finished.
  bool read();
  // Sends what there is to send. False: the channel is finished.
  bool write();
  virtual void closed() = 0;
  // The session has ended and all is sent. False: close the socket.
  virtual bool done() { return false; }
  size_t pending() const { return out.pending() + (tls ? tls->pending() : 0); }
  void mark();  // to be written at the end of this round

  Endpoint &endpoint;
  int fd;
  nghttp2_session *session = nullptr;
  Output out;
  std::unique_ptr<Tls> tls;
  bool dirty = false;
  bool dead = false;
  bool listed_for_write = false;  // epoll tells when there is room
  bool half_closed = false;       // our side of the socket is shut

 private:
  bool take(size_t size);
};

// A client's connection.
class Connection : public Channel {
 public:
  Connection(Endpoint &endpoint, int fd);
  ~Connection() override;
  void closed() override;
  bool done() override;

  Upstream *upstream = nullptr;
  Stream *streams = nullptr;  // a list, to find them when the connection breaks
  uint32_t open_streams = 0;
  bool begun = false;             // the client has said something that is HTTP/2
  int64_t quiet_ns = now_ns();    // since when nothing has been asked
  // A connection that is too old: its client is told that it ends, then up to which stream, then it is closed.
  enum class Age { kServing, kNoticed, kTold } age = Age::kServing;
  int64_t age_step_ns = kNever;   // when the next of these is due
  Known known;
};

// The private connection to the ordinary server that takes what is relayed from one client's connection.
class Upstream : public Channel {
 public:
  Upstream(Endpoint &endpoint, int fd, Connection *front);
  ~Upstream() override;
  void closed() override;

  Connection *front;
};

using Header = std::pair<std::string, std::string>;

// One stream of a client's connection.
struct Stream {
  enum class Kind { kUndecided, kServed, kRefused, kRelayed };

  Connection *connection = nullptr;
  int32_t id = 0;
  Kind kind = Kind::kUndecided;
  Stream *next = nullptr, *previous = nullptr;

  // The request's headers, as far as they matter.
  std::vector<std::pair<nghttp2_rcbuf *, nghttp2_rcbuf *>> headers;
  size_t header_bytes = 0;
  bool served_path = false, is_post = false, is_grpc = false;
  int64_t timeout_ns = kNever;
  Encoding encoding = Encoding::kIdentity;
  nghttp2_rcbuf *credentials = nullptr;  // the value of `authorization`, of a call of the served method

  std::unique_ptr<TraceHeaders> trace;   // of a call of the served method

  // A call of the served method.
  CallPtr call;
  unsigned char prefix[5] = {};
  size_t prefix_size = 0;
  size_t received = 0;  // of the message
  size_t counted = 0;   // bytes of `Endpoint::bytes` that are this call's
  bool complete = false;
  std::shared_ptr<Answer> answer;
  size_t sent = 0;

  // A relayed call: what has come from one side and not yet gone to the other.
  int32_t upstream_id = -1;
  std::string forth, back;
  bool forth_ended = false, back_ended = false, back_begun = false;
  std::vector<Header> back_headers;  // those being received
  std::vector<Header> trailers;
};

class Endpoint {
 public:
  Endpoint(std::vector<int> listeners, std::string method, std::string upstream_path, Limits limits, Refusal unseen);
  ~Endpoint();
  Endpoint(const Endpoint &) = delete;

  // Waits until something has arrived, was cancelled or the endpoint has ended. A `share` of the calls is refused before
  // their message is read. With a `hand_over_ns`, sockets are looked at every `look_ns` only, and what arrived is
  // returned after that time, or when somebody is in a hurry. Called by one thread.
  Polled poll(int64_t look_ns, int64_t hand_over_ns, double share);
  // Lets a poll that hands over later do so now.
  void hurry();
  // Queues an answer; whoever has taken the call gives it.
  void answer(const CallPtr &call, std::shared_ptr<Answer> answer);
  // Counts `size` more bytes as held by a call until it ends. False: that would be too many.
  bool count(Call &call, size_t size);
  // Sends what was queued.
  void flush();
  // Ends the endpoint: no new connections, no new calls; connections are closed when they are idle, at the latest after
  // `grace_ns`. Then `poll` says that it has ended.
  void stop(int64_t grace_ns);
  // Connections that are accepted from now on use TLS with this context.
  void secure(TlsContext context);
  // Who may call from now on.
  void admit(std::shared_ptr<const Access> access);
  bool polled_by_me() const { return poller_.load(std::memory_order_relaxed) == pthread_self(); }

  std::mutex lock;  // everything below, and all channels
  std::atomic<long> calls{0};
  std::atomic<size_t> bytes{0};
  std::atomic<long> connections{0};
  std::atomic<long> turned_away{0};  // connections beyond the limit
  std::array<std::atomic<long>, std::size(kWhyNames)> refused{};  // calls, by why
  const Limits limits;
  const std::string method;

  // What the connections report.
  void arrived(CallPtr call);
  void ended(Stream &stream);
  void refuse(Stream &stream, Why why, int status, std::string details, std::string pushback = "");
  void begin(Stream &stream);
  void relay(Stream &stream);
  void mark(Channel &channel);
  void watch(Channel &channel, bool for_write);
  void destroy(Channel &channel);
  char *read_buffer() { return read_buffer_.data(); }
  char *wire_buffer() { return wire_buffer_.data(); }
  static constexpr size_t kReadSize = 256 * 1024;

 private:
  void accept_from(int listener);
  void date(size_t first, int64_t from_ns, int64_t to_ns);
  void drain_answers();
  void write_all();
  void wind_down();
  void sweep(int64_t at_ns);
  bool retire(Connection &connection, int64_t at_ns);
  bool identify(Stream &stream);

  int epoll_ = -1;
  int wake_ = -1;  // an eventfd
  std::vector<int> listeners_;
  const std::string upstream_path_;
  const Refusal unseen_;
  Buffer read_buffer_;
  Buffer wire_buffer_;  // what was read of a connection with TLS
  TlsContext tls_;
  std::shared_ptr<const Access> access_;
  uint64_t access_generation_ = 0;
  std::vector<Channel *> channels_;
  std::vector<Channel *> dirty_;
  std::vector<Channel *> graveyard_;  // freed by the poller, which may hold events for them
  std::mutex answers_lock_;
  std::vector<std::pair<CallPtr, std::shared_ptr<Answer>>> answers_;
  std::atomic<bool> pacing_{false};   // whether the poller hands over later
  std::atomic<bool> waiting_{false};  // whether there are answers to send
  std::atomic<pthread_t> poller_{};
  Polled now_;
  double share_ = 0, credit_ = 0;
  std::atomic<bool> stopping_{false};
  bool announced_ = false;
  bool accept_paused_ = false;
  int64_t looked_ns_ = now_ns();
  int64_t stop_ns_ = 0;
  int64_t sweep_ns_ = 0;
  std::minstd_rand random_{std::random_device{}()};
};

}  // namespace onclock
