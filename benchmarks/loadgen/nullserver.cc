// nullserver: answers every gRPC request with one fixed empty-tensor message, status 0.
// It shows what loadgen itself can drive, and the floor of an h2 server's cost.
//   nullserver PORT [delay-us]   (delay: busy time spent per request)
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "common.h"

static std::string answer;
static long busy_ns = 0;
static int ep;
struct Conn {
  int fd;
  nghttp2_session *s;
  std::string out;
};
#define NV(n, v) {(uint8_t *)n, (uint8_t *)v, sizeof(n) - 1, sizeof(v) - 1, NGHTTP2_NV_FLAG_NONE}

static ssize_t body(nghttp2_session *s, int32_t id, uint8_t *buf, size_t len, uint32_t *flags, nghttp2_data_source *, void *) {
  if (len < answer.size()) return NGHTTP2_ERR_CALLBACK_FAILURE;
  memcpy(buf, answer.data(), answer.size());
  *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
  nghttp2_nv t[] = {NV("grpc-status", "0")};
  nghttp2_submit_trailer(s, id, t, 1);
  return ssize_t(answer.size());
}
static int on_frame(nghttp2_session *s, const nghttp2_frame *f, void *) {
  if ((f->hd.type != NGHTTP2_DATA && f->hd.type != NGHTTP2_HEADERS) || !(f->hd.flags & NGHTTP2_FLAG_END_STREAM)) return 0;
  if (busy_ns) for (int64_t e = now_ns() + busy_ns; now_ns() < e;) {}
  nghttp2_nv h[] = {NV(":status", "200"), NV("content-type", "application/grpc")};
  nghttp2_data_provider dp{};
  dp.read_callback = body;
  nghttp2_submit_response(s, f->hd.stream_id, h, 2, &dp);
  return 0;
}
static void drop(Conn *c) {
  close(c->fd);
  nghttp2_session_del(c->s);
  delete c;
}
int main(int argc, char **argv) {
  if (argc < 2) die("nullserver PORT [delay-us]");
  if (argc > 2) busy_ns = atol(argv[2]) * 1000;
  signal(SIGPIPE, SIG_IGN);
  std::string m, t, sh;
  put_bytes(m, 1, "null");
  put_bytes(t, 1, "y"); put_bytes(t, 2, "FP32"); put_varint(sh, 1); put_varint(sh, 16); put_bytes(t, 3, sh);
  put_bytes(m, 5, t);
  put_bytes(m, 6, std::string(64, '\0'));
  answer.assign(5, '\0');
  answer[4] = char(m.size());
  answer += m;
  int ls = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  setsockopt(ls, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_port = htons(uint16_t(atoi(argv[1])));
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(ls, (sockaddr *)&a, sizeof a) || listen(ls, 128)) die(strerror(errno));
  ep = epoll_create1(0);
  epoll_event e{};
  e.events = EPOLLIN;
  e.data.ptr = nullptr;
  epoll_ctl(ep, EPOLL_CTL_ADD, ls, &e);
  nghttp2_session_callbacks *cb;
  nghttp2_session_callbacks_new(&cb);
  nghttp2_session_callbacks_set_on_frame_recv_callback(cb, on_frame);
  static char buf[1 << 18];
  for (;;) {
    epoll_event ev[64];
    int n = epoll_wait(ep, ev, 64, -1);
    for (int i = 0; i < n; i++) {
      Conn *c = (Conn *)ev[i].data.ptr;
      if (!c) {
        int fd = accept(ls, nullptr, nullptr);
        if (fd < 0) continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c = new Conn{fd, nullptr, {}};
        nghttp2_session_server_new(&c->s, cb, c);
        nghttp2_settings_entry iv[] = {{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 16 << 20}};
        nghttp2_submit_settings(c->s, 0, iv, 1);
        nghttp2_session_set_local_window_size(c->s, 0, 0, 64 << 20);
        e.events = EPOLLIN;
        e.data.ptr = c;
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
      } else {
        ssize_t k = recv(c->fd, buf, sizeof buf, MSG_DONTWAIT);
        if (k <= 0) { if (k == 0 || errno != EAGAIN) drop(c); continue; }
        if (nghttp2_session_mem_recv(c->s, (uint8_t *)buf, size_t(k)) < 0) { drop(c); continue; }
      }
      c->out.clear();
      const uint8_t *d;
      ssize_t w;
      while ((w = nghttp2_session_mem_send(c->s, &d)) > 0) c->out.append((const char *)d, size_t(w));
      for (size_t o = 0; o < c->out.size();) {
        ssize_t q = send(c->fd, c->out.data() + o, c->out.size() - o, MSG_NOSIGNAL);
        if (q <= 0) break;
        o += size_t(q);
      }
    }
  }
}
