// loadgen: one-thread load generator; gRPC over cleartext HTTP/2 (libnghttp2) or HTTP/1.1.
// See README.md.
#include <sstream>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <deque>
#include <memory>

#include "common.h"

static Options opt;
static Stats st;
static bool grpc_mode;
static std::vector<std::string> bodies;  // encoded once; with --rows, `variants` of each row count after another
static std::vector<Record> records;      // --records
static int64_t load_start = 0;
static volatile sig_atomic_t interrupted = 0;

struct Conn;
struct Req {
  int64_t intended = 0, deadline = 0;
  size_t body = 0, off = 0;
  int32_t stream = -1;
  int grpc_status = -1, http_status = 0;
  Conn *conn = nullptr;
  std::string check;
  uint32_t gen = 0, index = 0;
  bool live = false;
};
static std::vector<std::unique_ptr<Req>> all_reqs;
static std::vector<Req *> free_reqs;
static std::deque<std::pair<Req *, uint32_t>> deadlines;  // in order of submission
static long inflight = 0;
static bool check_done = false;

static Req *new_req() {
  Req *r;
  if (free_reqs.empty()) {
    all_reqs.emplace_back(new Req);
    r = all_reqs.back().get();
  } else {
    r = free_reqs.back();
    free_reqs.pop_back();
  }
  r->off = 0; r->stream = -1; r->grpc_status = -1; r->http_status = 0; r->conn = nullptr;
  r->check.clear(); r->live = true; r->gen++;
  return r;
}

static long closed_credit = 0;  // closed loop: requests to start
static void finish(Req *r, int status) {
  int64_t t = now_ns();
  st.on_done(r->intended, t, status, grpc_mode ? 0 : 200);
  if (!opt.records.empty()) {
    records[r->index].status = int16_t(status);
    records[r->index].latency_ns = t - r->intended;
  }
  if (opt.check && !check_done && !r->check.empty()) {
    check_done = true;
    if (grpc_mode && r->check.size() > 5) print_infer_response((const uint8_t *)r->check.data() + 5, r->check.size() - 5);
    else fprintf(stderr, "check: %.*s\n", int(std::min<size_t>(r->check.size(), 600)), r->check.data());
  }
  r->live = false;
  free_reqs.push_back(r);
  inflight--;
  if (opt.concurrency) closed_credit++;
}

static int ep;
static sockaddr_storage addr;
static socklen_t addrlen;

struct Conn {
  int fd = -1;
  bool want_out = false;
  std::string out;
  size_t out_off = 0;
  // gRPC
  nghttp2_session *s = nullptr;
  // HTTP/1.1
  Req *cur = nullptr;
  std::string in;
  long need = -1;   // bytes of the answer in all, -1: header not whole yet
  bool chunked = false;
  size_t body_at = 0;
  int code = 0;
};
static std::vector<std::unique_ptr<Conn>> conns;
static std::vector<Conn *> idle1;      // http1: idle connections
static std::deque<Req *> waiting1;     // http1: requests with no connection yet

static void set_out(Conn *c, bool on) {
  if (c->want_out == on) return;
  c->want_out = on;
  epoll_event e{};
  e.events = EPOLLIN | (on ? EPOLLOUT : 0u);
  e.data.ptr = c;
  epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e);
}

static void connect_tcp(Conn *c) {
  c->fd = socket(addr.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (c->fd < 0 || connect(c->fd, (sockaddr *)&addr, addrlen) != 0) die(std::string("connect: ") + strerror(errno));
  int one = 1, fl = 4 << 20;
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  // Where the system's default is BBR, it paces: a dozen packets in flight, and every ten seconds 200 ms with four of
  // them. On a loopback that would be measured as the server's latency. Without loss Reno does not slow down.
  setsockopt(c->fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
  setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &fl, sizeof fl);
  c->out.clear(); c->out_off = 0; c->want_out = false; c->in.clear(); c->need = -1;
  epoll_event e{};
  e.events = EPOLLIN;
  e.data.ptr = c;
  epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e);
}

// ------------------------------------------------------------------ gRPC over h2
static ssize_t read_body(nghttp2_session *, int32_t, uint8_t *buf, size_t len, uint32_t *flags,
                         nghttp2_data_source *src, void *) {
  Req *r = (Req *)src->ptr;
  const std::string &b = bodies[r->body];
  size_t n = std::min(len, b.size() - r->off);
  memcpy(buf, b.data() + r->off, n);
  r->off += n;
  if (r->off == b.size()) *flags |= NGHTTP2_DATA_FLAG_EOF;
  return ssize_t(n);
}
static int on_header(nghttp2_session *s, const nghttp2_frame *f, const uint8_t *n, size_t nl, const uint8_t *v, size_t,
                     uint8_t, void *) {
  Req *r = (Req *)nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
  if (!r) return 0;
  if (nl == 11 && !memcmp(n, "grpc-status", 11)) r->grpc_status = atoi((const char *)v);
  else if (nl == 7 && !memcmp(n, ":status", 7)) r->http_status = atoi((const char *)v);
  else if (opt.check && !check_done && nl == 12 && !memcmp(n, "grpc-message", 12)) {
    static int shown = 0;
    if (shown++ < 3) fprintf(stderr, "check: grpc-message %s\n", (const char *)v);
  }
  return 0;
}
static int on_data(nghttp2_session *s, uint8_t, int32_t id, const uint8_t *d, size_t n, void *) {
  if (opt.check && !check_done) {
    Req *r = (Req *)nghttp2_session_get_stream_user_data(s, id);
    if (r) r->check.append((const char *)d, n);
  }
  return 0;
}
static int on_close(nghttp2_session *s, int32_t id, uint32_t err, void *) {
  Req *r = (Req *)nghttp2_session_get_stream_user_data(s, id);
  if (!r) return 0;
  int status = r->grpc_status;
  if (status < 0) status = err == NGHTTP2_REFUSED_STREAM ? 14 : (r->http_status && r->http_status != 200) ? 14 : err ? 13 : 2;
  finish(r, status);
  return 0;
}
static std::vector<nghttp2_nv> hdrs;
static std::deque<std::string> hdr_store;
static void add_header(const std::string &n, const std::string &v) {
  hdr_store.push_back(n); std::string &a = hdr_store.back();
  hdr_store.push_back(v); std::string &b = hdr_store.back();
  hdrs.push_back({(uint8_t *)a.data(), (uint8_t *)b.data(), a.size(), b.size(),
                  NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE});
}
static void h2_open(Conn *c) {
  connect_tcp(c);
  nghttp2_session_callbacks *cb;
  nghttp2_session_callbacks_new(&cb);
  nghttp2_session_callbacks_set_on_header_callback(cb, on_header);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(cb, on_data);
  nghttp2_session_callbacks_set_on_stream_close_callback(cb, on_close);
  nghttp2_session_client_new(&c->s, cb, c);
  nghttp2_session_callbacks_del(cb);
  nghttp2_settings_entry iv[] = {{NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
                                 {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 16 << 20},
                                 {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, 1 << 20}};
  nghttp2_submit_settings(c->s, NGHTTP2_FLAG_NONE, iv, 3);
  nghttp2_session_set_local_window_size(c->s, NGHTTP2_FLAG_NONE, 0, 64 << 20);
}
static void conn_lost(Conn *c, const char *why) {
  fprintf(stderr, "loadgen: connection lost (%s)\n", why);
  // every request of this connection fails
  for (auto &r : all_reqs)
    if (r->live && r->conn == c) {
      if (r->stream >= 0) nghttp2_session_set_stream_user_data(c->s, r->stream, nullptr);
      finish(r.get(), ST_CONN);
    }
  close(c->fd);
  nghttp2_session_del(c->s);
  c->s = nullptr;
  h2_open(c);
}
static void h2_flush(Conn *c) {
  for (;;) {
    while (c->out.size() - c->out_off < (256u << 10)) {
      const uint8_t *d;
      ssize_t n = nghttp2_session_mem_send(c->s, &d);
      if (n < 0) { conn_lost(c, nghttp2_strerror(int(n))); return; }
      if (n == 0) break;
      c->out.append((const char *)d, size_t(n));
    }
    if (c->out_off == c->out.size()) { c->out.clear(); c->out_off = 0; set_out(c, false); return; }
    ssize_t w = send(c->fd, c->out.data() + c->out_off, c->out.size() - c->out_off, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (w < 0) {
      if (errno == EAGAIN || errno == EINTR) { set_out(c, true); return; }
      conn_lost(c, strerror(errno));
      return;
    }
    c->out_off += size_t(w);
    if (c->out_off == c->out.size()) { c->out.clear(); c->out_off = 0; }
    else if (c->out_off > (1u << 20)) { c->out.erase(0, c->out_off); c->out_off = 0; }
  }
}
static void h2_submit(Conn *c, Req *r) {
  r->conn = c;
  nghttp2_data_provider dp;
  dp.source.ptr = r;
  dp.read_callback = read_body;
  r->stream = nghttp2_submit_request(c->s, nullptr, hdrs.data(), hdrs.size(), &dp, r);
  if (r->stream < 0) { finish(r, ST_CONN); return; }
}
static char rbuf[1 << 18];
static void h2_read(Conn *c) {
  for (int k = 0; k < 4; k++) {
    ssize_t n = recv(c->fd, rbuf, sizeof rbuf, MSG_DONTWAIT);
    if (n < 0) {
      if (errno == EAGAIN || errno == EINTR) return;
      conn_lost(c, strerror(errno));
      return;
    }
    if (n == 0) { conn_lost(c, "closed by the server"); return; }
    ssize_t u = nghttp2_session_mem_recv(c->s, (uint8_t *)rbuf, size_t(n));
    if (u < 0) { conn_lost(c, nghttp2_strerror(int(u))); return; }
    if (n < ssize_t(sizeof rbuf)) return;
  }
}

// ------------------------------------------------------------------ HTTP/1.1
static void h1_start(Conn *c, Req *r);
static void h1_release(Conn *c) {
  c->cur = nullptr;
  c->in.clear();
  c->need = -1;
  if (!waiting1.empty()) {
    Req *r = waiting1.front();
    waiting1.pop_front();
    h1_start(c, r);
  } else idle1.push_back(c);
}
static void h1_reopen(Conn *c) {
  close(c->fd);
  connect_tcp(c);
}
static void h1_fail(Conn *c, int status) {
  Req *r = c->cur;
  c->cur = nullptr;
  bool was_idle = !r;
  h1_reopen(c);
  if (r) finish(r, status);
  if (!was_idle) h1_release(c);
}
static void h1_flush(Conn *c) {
  while (c->out_off < c->out.size()) {
    ssize_t w = send(c->fd, c->out.data() + c->out_off, c->out.size() - c->out_off, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (w < 0) {
      if (errno == EAGAIN || errno == EINTR) { set_out(c, true); return; }
      h1_fail(c, ST_CONN);
      return;
    }
    c->out_off += size_t(w);
  }
  c->out.clear(); c->out_off = 0;
  set_out(c, false);
}
static void h1_start(Conn *c, Req *r) {
  r->conn = c;
  c->cur = r;
  c->out = bodies[r->body];
  c->out_off = 0;
  h1_flush(c);
}
static bool h1_whole(Conn *c) {
  if (c->need < 0) {
    size_t p = c->in.find("\r\n\r\n");
    if (p == std::string::npos) return false;
    c->body_at = p + 4;
    c->code = c->in.size() > 12 ? atoi(c->in.c_str() + 9) : 0;
    c->chunked = false;
    long len = 0;
    size_t i = c->in.find("\r\n") + 2;
    while (i < p) {
      size_t j = c->in.find("\r\n", i);
      if (!strncasecmp(&c->in[i], "content-length:", 15)) len = atol(&c->in[i + 15]);
      if (!strncasecmp(&c->in[i], "transfer-encoding:", 18) && c->in.substr(i, j - i).find("chunked") != std::string::npos) c->chunked = true;
      i = j + 2;
    }
    c->need = long(c->body_at) + len;
  }
  if (c->chunked) return c->in.size() >= 5 && c->in.compare(c->in.size() - 5, 5, "0\r\n\r\n") == 0;
  return long(c->in.size()) >= c->need;
}
static void h1_read(Conn *c) {
  ssize_t n = recv(c->fd, rbuf, sizeof rbuf, MSG_DONTWAIT);
  if (n < 0) { if (errno != EAGAIN && errno != EINTR) h1_fail(c, ST_CONN); return; }
  if (n == 0) { h1_fail(c, ST_CONN); return; }
  if (!c->cur) return;
  c->in.append(rbuf, size_t(n));
  if (!h1_whole(c)) return;
  Req *r = c->cur;
  if (opt.check && !check_done) r->check = c->in;
  bool closing = strcasestr(c->in.substr(0, c->body_at).c_str(), "\r\nconnection: close") != nullptr;
  c->cur = nullptr;
  finish(r, c->code);
  if (closing) h1_reopen(c);
  h1_release(c);
}

// ------------------------------------------------------------------ main loop
static size_t rr = 0, body_rr = 0;
static std::mt19937_64 rows_g;
static std::discrete_distribution<size_t> rows_d;
static uint32_t note(int64_t intended, int64_t sent, int status, uint16_t rows) {
  if (opt.records.empty()) return 0;
  records.push_back({uint32_t(records.size()), int16_t(status), rows, intended - load_start, sent - intended, -1});
  return records.back().index;
}
static void start_request(int64_t intended) {
  Req *r = new_req();
  r->intended = intended;
  r->body = body_rr++ % size_t(opt.variants);
  uint16_t rows = 0;
  if (!opt.rows.empty()) {
    size_t k = rows_d(rows_g);
    r->body += k * size_t(opt.variants);
    rows = uint16_t(opt.rows[k].first);
  }
  inflight++;
  if (opt.deadline_ms > 0) {
    r->deadline = intended + int64_t(opt.deadline_ms * 1e6);
    deadlines.emplace_back(r, r->gen);
  }
  int64_t sent = now_ns();
  st.on_sent(intended, sent);
  r->index = note(intended, sent, ST_UNFINISHED, rows);
  if (grpc_mode) h2_submit(conns[rr++ % conns.size()].get(), r);
  else if (!idle1.empty()) { Conn *c = idle1.back(); idle1.pop_back(); h1_start(c, r); }
  else waiting1.push_back(r);
}
static void expire(int64_t t) {
  while (!deadlines.empty()) {
    auto [r, gen] = deadlines.front();
    if (!r->live || r->gen != gen) { deadlines.pop_front(); continue; }
    if (r->deadline > t) return;
    deadlines.pop_front();
    if (grpc_mode) {
      nghttp2_session_set_stream_user_data(r->conn->s, r->stream, nullptr);
      nghttp2_submit_rst_stream(r->conn->s, NGHTTP2_FLAG_NONE, r->stream, NGHTTP2_CANCEL);
      finish(r, 4);
    } else if (r->conn) {
      h1_fail(r->conn, 408);
    } else {
      waiting1.erase(std::find(waiting1.begin(), waiting1.end(), r));
      finish(r, 408);
    }
  }
}

int main(int argc, char **argv) {
  opt = parse_args(argc, argv);
  grpc_mode = opt.protocol == "grpc";
  if (!grpc_mode && opt.protocol != "http1") die("--protocol grpc or http1");
  prctl(PR_SET_TIMERSLACK, 1);
  Arrivals arr;
  bool open = opt.open();
  if (open) arr.init(opt, 0);  // reads the file before anything is sent
  if (!opt.records.empty()) records.reserve(arr.recorded.empty() ? 1 << 20 : arr.recorded.size());
  signal(SIGPIPE, SIG_IGN);
  signal(SIGINT, [](int) { interrupted = 1; });

  addrinfo hint{}, *ai;
  hint.ai_socktype = SOCK_STREAM;
  if (getaddrinfo(opt.host.c_str(), opt.port.c_str(), &hint, &ai) != 0) die("cannot resolve " + opt.host);
  memcpy(&addr, ai->ai_addr, ai->ai_addrlen);
  addrlen = ai->ai_addrlen;
  freeaddrinfo(ai);
  std::string hostport = opt.host + ":" + opt.port;

  // One set of tensors per row count.
  std::vector<Options> shaped;
  for (auto &w : opt.rows) {
    shaped.push_back(opt);
    for (auto &in : shaped.back().inputs) in.shape.at(0) = w.first;
  }
  if (opt.rows.empty()) shaped.push_back(opt);
  std::vector<double> weights;
  for (auto &w : opt.rows) weights.push_back(w.second);
  rows_d = std::discrete_distribution<size_t>(weights.begin(), weights.end());
  rows_g.seed(opt.seed * 104729 + 3);

  if (grpc_mode) {
    add_header(":method", "POST");
    add_header(":scheme", "http");
    add_header(":path", opt.path.empty() ? "/inference.GRPCInferenceService/ModelInfer" : opt.path);
    add_header(":authority", hostport);
    add_header("te", "trailers");
    add_header("content-type", "application/grpc");
    add_header("user-agent", "loadgen/1");
    if (opt.deadline_ms > 0) add_header("grpc-timeout", std::to_string(long(opt.deadline_ms * 1000)) + "u");
    for (auto &h : opt.headers) add_header(h.first, h.second);
    for (auto &o : shaped) {
      // Several models, separated by commas, are asked in turn.
      std::vector<std::string> models;
      std::stringstream named(o.model);
      for (std::string one; std::getline(named, one, ',');) models.push_back(one);
      size_t turn = 0;
      for (auto &raw : make_tensors(o)) {
        if (models.size() > 1) o.model = models[turn++ % models.size()];
        std::string m;
        if (!o.body_file.empty()) m = encode_http(o, raw).body;
        else m = encode_infer(o, raw);
        std::string b(5, '\0');
        for (int k = 0; k < 4; k++) b[size_t(1 + k)] = char(m.size() >> (24 - 8 * k));
        bodies.push_back(b + m);
      }
    }
  } else {
    std::string path = opt.path.empty() ? "/v2/models/" + opt.model + "/infer" : opt.path;
    for (auto &o : shaped)
      for (auto &raw : make_tensors(o)) {
        HttpBody h = encode_http(o, raw);
        std::string b = "POST " + path + " HTTP/1.1\r\nHost: " + hostport + "\r\nContent-Type: " + h.type +
                        "\r\nContent-Length: " + std::to_string(h.body.size()) + "\r\n" + h.extra;
        for (auto &x : opt.headers) b += x.first + ": " + x.second + "\r\n";
        bodies.push_back(b + "\r\n" + h.body);
      }
  }

  ep = epoll_create1(EPOLL_CLOEXEC);
  for (int i = 0; i < opt.connections; i++) {
    conns.emplace_back(new Conn);
    if (grpc_mode) { h2_open(conns.back().get()); h2_flush(conns.back().get()); }
    else { connect_tcp(conns.back().get()); idle1.push_back(conns.back().get()); }
  }

  int64_t start = now_ns() + 50000000;  // let the connections settle
  load_start = start;
  arr.base = start;
  st.win0 = start + int64_t(opt.warmup * 1e9);
  st.win1 = st.win0 + int64_t(opt.duration * 1e9);
  st.slo_ms = opt.slo_ms;
  int64_t hard_end = st.win1 + int64_t(opt.drain * 1e9);
  if (!open) closed_credit = opt.concurrency;

  epoll_event ev[256];
  for (;;) {
    int64_t t = now_ns();
    st.sample(opt, t);
    if (interrupted) break;
    bool sending = t < st.win1;
    if (!sending && st.sampled1 && (inflight == 0 || t >= hard_end)) break;
    if (sending) {
      if (open) {
        int budget = 4096;
        while (budget-- > 0 && arr.next() <= t) {
          int64_t at = arr.next();
          arr.step();
          if (at >= st.win1) break;
          if (inflight >= opt.max_inflight) {
            if (st.in_window(at)) { st.sent++; st.errors[ST_CLIENT_DROP]++; }
            note(at, at, ST_CLIENT_DROP, 0);
            continue;
          }
          start_request(at);
        }
      } else if (t >= start) {
        while (closed_credit > 0) { closed_credit--; start_request(now_ns()); }
      }
    }
    if (opt.deadline_ms > 0) expire(t);
    if (grpc_mode)
      for (auto &c : conns)
        if (nghttp2_session_want_write(c->s) && !c->want_out) h2_flush(c.get());

    int64_t wake = hard_end;
    if (sending) {
      wake = std::min(wake, st.win1);
      wake = std::min(wake, open ? arr.next() : (closed_credit > 0 ? start : wake));
      if (t < st.win0) wake = std::min(wake, st.win0);
    }
    if (opt.deadline_ms > 0 && !deadlines.empty()) wake = std::min(wake, deadlines.front().first->deadline);
    int64_t d = opt.spin ? 0 : std::max<int64_t>(0, wake - now_ns());
    timespec ts{time_t(d / 1000000000), long(d % 1000000000)};
    int n = epoll_pwait2(ep, ev, 256, &ts, nullptr);
    for (int i = 0; i < n; i++) {
      Conn *c = (Conn *)ev[i].data.ptr;
      if (grpc_mode) {
        if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) h2_read(c);
        if (ev[i].events & EPOLLOUT) h2_flush(c);
      } else {
        if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) h1_read(c);
        if (ev[i].events & EPOLLOUT) h1_flush(c);
      }
    }
  }
  for (auto &r : all_reqs)
    if (r->live && st.in_window(r->intended)) st.errors[ST_UNFINISHED]++;
  report(opt, st);
  if (!opt.records.empty()) {
    FILE *f = fopen(opt.records.c_str(), "wb");
    if (!f) die("cannot write " + opt.records);
    size_t n = fwrite(records.data(), sizeof(Record), records.size(), f);
    if (fclose(f) != 0 || n != records.size()) die("cannot write all of " + opt.records);
  }
  return 0;
}
