// loadgen: shared parts (options, arrivals, payload encoding, statistics, output).
// Depends only on libc and the C++ standard library.
#pragma once
#include <dirent.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000LL + t.tv_nsec;
}

[[noreturn]] inline void die(const std::string &m) {
  fprintf(stderr, "loadgen: %s\n", m.c_str());
  exit(2);
}

// ---------------------------------------------------------------- protobuf wire
inline void put_varint(std::string &s, uint64_t v) {
  while (v >= 0x80) { s.push_back(char(v | 0x80)); v >>= 7; }
  s.push_back(char(v));
}
inline void put_bytes(std::string &s, int field, const std::string &v) {
  put_varint(s, uint64_t(field) << 3 | 2);
  put_varint(s, v.size());
  s += v;
}
inline void put_int(std::string &s, int field, uint64_t v) {
  put_varint(s, uint64_t(field) << 3);
  put_varint(s, v);
}
// Reads one field; returns false at the end or on damage.
struct WireReader {
  const uint8_t *p, *e;
  int field = 0, type = 0;
  uint64_t num = 0;
  const uint8_t *b = nullptr;
  size_t n = 0;
  bool varint(uint64_t &v) {
    v = 0;
    for (int sh = 0; sh < 70 && p < e; sh += 7) {
      uint8_t c = *p++;
      v |= uint64_t(c & 0x7f) << sh;
      if (!(c & 0x80)) return true;
    }
    return false;
  }
  bool next() {
    uint64_t k;
    if (p >= e || !varint(k)) return false;
    field = int(k >> 3);
    type = int(k & 7);
    if (type == 0) return varint(num);
    if (type == 1) { if (e - p < 8) return false; b = p; n = 8; p += 8; return true; }
    if (type == 5) { if (e - p < 4) return false; b = p; n = 4; p += 4; return true; }
    if (type != 2) return false;
    uint64_t l;
    if (!varint(l) || l > uint64_t(e - p)) return false;
    b = p; n = size_t(l); p += l;
    return true;
  }
};

// ---------------------------------------------------------------- options
struct Input {
  std::string name, dtype;
  std::vector<int64_t> shape;
};
struct Options {
  std::string host = "127.0.0.1", port = "8001", protocol = "grpc", model, name, out;
  std::string path, body_file, content_type, http_format = "oip-json", dist = "poisson", arrivals, records;
  std::vector<Input> inputs;
  std::vector<std::pair<std::string, std::string>> params;   // name, int64 text or "string"
  std::vector<std::pair<std::string, std::string>> headers;  // extra metadata
  std::vector<std::pair<int64_t, double>> rows;              // rows of a request, weight; empty: as --input says
  int connections = 1, variants = 1;
  double rate = 0, duration = 5, warmup = 1, drain = 5, deadline_ms = 0, slo_ms = 0;
  long concurrency = 0, max_inflight = 200000;
  std::vector<int> pids;
  uint64_t seed = 1;
  bool check = false, spin = false;
  bool open() const { return rate > 0 || !arrivals.empty(); }
};

inline size_t dtype_size(const std::string &d) {
  if (d == "FP32" || d == "INT32" || d == "UINT32") return 4;
  if (d == "FP64" || d == "INT64" || d == "UINT64") return 8;
  if (d == "FP16" || d == "BF16" || d == "INT16" || d == "UINT16") return 2;
  if (d == "INT8" || d == "UINT8" || d == "BOOL") return 1;
  die("dtype not supported: " + d);
}

inline void usage() {
  puts(
      "loadgen [options]\n"
      "  --url HOST:PORT          server (default 127.0.0.1:8001)\n"
      "  --protocol grpc|http1    gRPC over cleartext HTTP/2, or HTTP/1.1 keep-alive\n"
      "  --model NAME             model name; several, separated by commas, in turn (gRPC; --variants says how many)\n"
      "  --input NAME:DTYPE:1,16  input tensor, random contents (repeatable)\n"
      "  --rate R                 open loop: R arrivals per second\n"
      "  --concurrency C          closed loop: C requests in flight\n"
      "  --dist poisson|constant  arrival process of the open loop\n"
      "  --arrivals FILE          open loop: times in seconds from the start, ascending, drawn in advance;\n"
      "                           one a line, or native float64 if the name ends in .f64\n"
      "  --records FILE           write one 32-byte record per request (layout: README.md)\n"
      "  --rows N:W,N:W,...       first dimension of every input drawn per request with these weights\n"
      "  --connections N          connections (http1: also the number in flight)\n"
      "  --duration S --warmup S --drain S\n"
      "  --deadline-ms D          per-request deadline: sent as grpc-timeout and enforced here\n"
      "  --slo-ms S               goodput = ok answers within S ms of the intended send time\n"
      "  --pid P[,P]              server process ids: CPU time of them and their descendants\n"
      "  --param NAME=INT         request parameter (int64) (repeatable)\n"
      "  --header NAME=VALUE      request header / metadata (repeatable)\n"
      "  --variants K             K different random payloads, used in turn\n"
      "  --max-inflight N         open loop: past it an arrival is counted as 'client_drop'\n"
      "  --path P                 HTTP path (http1; default /v2/models/MODEL/infer), or gRPC method\n"
      "  --http-format oip-json|oip-binary|raw|json-list   body of http1 requests\n"
      "  --body-file F --content-type T   fixed http1 body instead\n"
      "  --spin                   poll instead of sleeping between arrivals\n"
      "  --check                  print the first answer's outputs to stderr\n"
      "  --name LABEL --out FILE  label in, and file for, the JSON result (default stdout)\n"
      "  --seed N");
}

inline std::vector<std::string> split(const std::string &s, char c) {
  std::vector<std::string> r;
  size_t i = 0;
  for (;;) {
    size_t j = s.find(c, i);
    r.push_back(s.substr(i, j == std::string::npos ? j : j - i));
    if (j == std::string::npos) return r;
    i = j + 1;
  }
}

inline Options parse_args(int argc, char **argv) {
  Options o;
  auto kv = [](const std::string &v) {
    size_t i = v.find('=');
    if (i == std::string::npos) die("expected NAME=VALUE: " + v);
    return std::make_pair(v.substr(0, i), v.substr(i + 1));
  };
  for (int i = 1; i < argc; i++) {
    std::string a = argv[i];
    if (a == "--help" || a == "-h") { usage(); exit(0); }
    if (a == "--check") { o.check = true; continue; }
    if (a == "--spin") { o.spin = true; continue; }
    if (i + 1 >= argc) die("no value for " + a);
    std::string v = argv[++i];
    if (a == "--url") {
      size_t c = v.rfind(':');
      if (c == std::string::npos) die("--url HOST:PORT");
      o.host = v.substr(0, c); o.port = v.substr(c + 1);
    } else if (a == "--protocol") o.protocol = v;
    else if (a == "--model") o.model = v;
    else if (a == "--input") {
      auto p = split(v, ':');
      if (p.size() != 3) die("--input NAME:DTYPE:SHAPE");
      Input in; in.name = p[0]; in.dtype = p[1];
      for (auto &d : split(p[2], ',')) in.shape.push_back(atoll(d.c_str()));
      o.inputs.push_back(in);
    } else if (a == "--rate") o.rate = atof(v.c_str());
    else if (a == "--concurrency") o.concurrency = atol(v.c_str());
    else if (a == "--dist") o.dist = v;
    else if (a == "--arrivals") o.arrivals = v;
    else if (a == "--records") o.records = v;
    else if (a == "--rows") {
      for (auto &t : split(v, ',')) {
        auto p = split(t, ':');
        int64_t n = atoll(p[0].c_str());
        double w = p.size() > 1 ? atof(p[1].c_str()) : 1;
        if (p.size() > 2 || n < 1 || w <= 0) die("--rows ROWS:WEIGHT,... with both positive: " + v);
        o.rows.emplace_back(n, w);
      }
    }
    else if (a == "--connections") o.connections = atoi(v.c_str());
    else if (a == "--duration") o.duration = atof(v.c_str());
    else if (a == "--warmup") o.warmup = atof(v.c_str());
    else if (a == "--drain") o.drain = atof(v.c_str());
    else if (a == "--deadline-ms") o.deadline_ms = atof(v.c_str());
    else if (a == "--slo-ms") o.slo_ms = atof(v.c_str());
    else if (a == "--pid") { for (auto &p : split(v, ',')) o.pids.push_back(atoi(p.c_str())); }
    else if (a == "--param") o.params.push_back(kv(v));
    else if (a == "--header") o.headers.push_back(kv(v));
    else if (a == "--variants") o.variants = atoi(v.c_str());
    else if (a == "--max-inflight") o.max_inflight = atol(v.c_str());
    else if (a == "--path") o.path = v;
    else if (a == "--http-format") o.http_format = v;
    else if (a == "--body-file") o.body_file = v;
    else if (a == "--content-type") o.content_type = v;
    else if (a == "--name") o.name = v;
    else if (a == "--out") o.out = v;
    else if (a == "--seed") o.seed = strtoull(v.c_str(), nullptr, 10);
    else die("unknown option " + a);
  }
  if ((o.rate > 0) + !o.arrivals.empty() + (o.concurrency > 0) != 1)
    die("give exactly one of --rate, --arrivals and --concurrency");
  if (o.connections < 1 || o.variants < 1) die("--connections and --variants must be at least 1");
  if (o.duration <= 0) die("--duration must be positive");
  return o;
}

// ---------------------------------------------------------------- payloads
inline std::string random_tensor(const Input &in, std::mt19937_64 &g) {
  size_t n = 1;
  for (auto d : in.shape) n *= size_t(d);
  size_t w = dtype_size(in.dtype);
  std::string r(n * w, '\0');
  std::uniform_real_distribution<float> u(0.f, 1.f);
  for (size_t i = 0; i < n; i++) {
    char *p = &r[i * w];
    if (in.dtype == "FP32") { float f = u(g); memcpy(p, &f, 4); }
    else if (in.dtype == "FP64") { double f = u(g); memcpy(p, &f, 8); }
    else if (in.dtype == "FP16") { uint16_t h = uint16_t(0x3000 + g() % 0x0c00); memcpy(p, &h, 2); }
    else if (in.dtype == "BF16") { float f = u(g); memcpy(p, (char *)&f + 2, 2); }
    else if (in.dtype == "BOOL") *p = char(g() & 1);
    else *p = char(g() % 100);  // integers: 0..99, little endian
  }
  return r;
}

// A ModelInferRequest of the Open Inference Protocol (KServe v2), tensors raw.
// Field numbers: request model_name=1 parameters=4 inputs=5 raw_input_contents=7;
// input tensor name=1 datatype=2 shape=3; map entry key=1 value=2; parameter int64=2.
inline std::string encode_infer(const Options &o, const std::vector<std::string> &raw) {
  std::string m;
  put_bytes(m, 1, o.model);
  for (auto &p : o.params) {
    std::string val, ent;
    put_int(val, 2, uint64_t(atoll(p.second.c_str())));
    put_bytes(ent, 1, p.first);
    put_bytes(ent, 2, val);
    put_bytes(m, 4, ent);
  }
  for (auto &in : o.inputs) {
    std::string t, sh;
    put_bytes(t, 1, in.name);
    put_bytes(t, 2, in.dtype);
    for (auto d : in.shape) put_varint(sh, uint64_t(d));
    put_bytes(t, 3, sh);
    put_bytes(m, 5, t);
  }
  for (auto &r : raw) put_bytes(m, 7, r);
  return m;
}

inline void json_tensor(std::string &s, const Input &in, const std::string &raw) {
  char b[40];
  size_t w = dtype_size(in.dtype), n = raw.size() / w;
  for (size_t i = 0; i < n; i++) {
    if (i) s += ',';
    if (in.dtype == "FP32") { float f; memcpy(&f, &raw[i * 4], 4); snprintf(b, sizeof b, "%.9g", f); }
    else if (in.dtype == "FP64") { double f; memcpy(&f, &raw[i * 8], 8); snprintf(b, sizeof b, "%.17g", f); }
    else { int64_t v = 0; memcpy(&v, &raw[i * w], w); snprintf(b, sizeof b, "%lld", (long long)v); }
    s += b;
  }
}

struct HttpBody { std::string body, type, extra; };
inline HttpBody encode_http(const Options &o, const std::vector<std::string> &raw) {
  HttpBody h;
  if (!o.body_file.empty()) {
    FILE *f = fopen(o.body_file.c_str(), "rb");
    if (!f) die("cannot read " + o.body_file);
    char buf[65536]; size_t n;
    while ((n = fread(buf, 1, sizeof buf, f)) > 0) h.body.append(buf, n);
    fclose(f);
    h.type = "application/octet-stream";
  } else if (o.http_format == "raw") {
    for (auto &r : raw) h.body += r;
    h.type = "application/octet-stream";
  } else if (o.http_format == "json-list") {  // {"x":[...]} flat
    h.body = "{";
    for (size_t i = 0; i < raw.size(); i++) {
      if (i) h.body += ',';
      h.body += "\"" + o.inputs[i].name + "\":[";
      json_tensor(h.body, o.inputs[i], raw[i]);
      h.body += "]";
    }
    h.body += "}";
    h.type = "application/json";
  } else {
    bool bin = o.http_format == "oip-binary";
    std::string &s = h.body;
    s = "{\"inputs\":[";
    for (size_t i = 0; i < raw.size(); i++) {
      auto &in = o.inputs[i];
      if (i) s += ',';
      s += "{\"name\":\"" + in.name + "\",\"datatype\":\"" + in.dtype + "\",\"shape\":[";
      for (size_t k = 0; k < in.shape.size(); k++) s += (k ? "," : "") + std::to_string(in.shape[k]);
      s += "],";
      if (bin) s += "\"parameters\":{\"binary_data_size\":" + std::to_string(raw[i].size()) + "}}";
      else { s += "\"data\":["; json_tensor(s, in, raw[i]); s += "]}"; }
    }
    s += "]";
    if (bin) s += ",\"parameters\":{\"binary_data_output\":true}";
    s += "}";
    h.type = "application/json";
    if (bin) {
      h.extra = "Inference-Header-Content-Length: " + std::to_string(s.size()) + "\r\n";
      h.type = "application/octet-stream";
      for (auto &r : raw) s += r;
    }
  }
  if (!o.content_type.empty()) h.type = o.content_type;
  return h;
}

inline std::vector<std::vector<std::string>> make_tensors(const Options &o) {
  std::mt19937_64 g(o.seed * 7919 + 17);
  std::vector<std::vector<std::string>> v;
  for (int k = 0; k < o.variants; k++) {
    std::vector<std::string> raw;
    for (auto &in : o.inputs) raw.push_back(random_tensor(in, g));
    v.push_back(raw);
  }
  return v;
}

inline void print_infer_response(const uint8_t *p, size_t n) {
  WireReader r{p, p + n};
  while (r.next()) {
    if (r.field == 1) fprintf(stderr, "check: model_name %.*s\n", int(r.n), r.b);
    if (r.field == 5) {
      WireReader t{r.b, r.b + r.n};
      std::string nm, dt, sh;
      while (t.next()) {
        if (t.field == 1) nm.assign((const char *)t.b, t.n);
        if (t.field == 2) dt.assign((const char *)t.b, t.n);
        if (t.field == 3) {
          WireReader q{t.b, t.b + t.n}; uint64_t v;
          if (t.type == 2) while (q.p < q.e && q.varint(v)) sh += std::to_string(v) + ",";
          else sh += std::to_string(t.num) + ",";
        }
      }
      fprintf(stderr, "check: output %s %s [%s]\n", nm.c_str(), dt.c_str(), sh.c_str());
    }
    if (r.field == 6) {
      float f[4] = {0, 0, 0, 0};
      memcpy(f, r.b, std::min(r.n, sizeof f));
      fprintf(stderr, "check: raw output %zu bytes, as FP32: %g %g %g %g\n", r.n, f[0], f[1], f[2], f[3]);
    }
  }
}

// ---------------------------------------------------------------- CPU time of a process tree
inline double tree_cpu_seconds(const std::vector<int> &roots) {
  if (roots.empty()) return 0;
  std::map<int, std::pair<int, double>> procs;  // pid -> ppid, cpu
  DIR *d = opendir("/proc");
  if (!d) return 0;
  double tick = double(sysconf(_SC_CLK_TCK));
  while (dirent *e = readdir(d)) {
    int pid = atoi(e->d_name);
    if (pid <= 0) continue;
    char path[64], buf[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *f = fopen(path, "r");
    if (!f) continue;
    size_t n = fread(buf, 1, sizeof buf - 1, f);
    fclose(f);
    buf[n] = 0;
    char *q = strrchr(buf, ')');
    if (!q) continue;
    int ppid; unsigned long ut, st;
    if (sscanf(q + 2, "%*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &ppid, &ut, &st) != 3) continue;
    procs[pid] = {ppid, double(ut + st) / tick};
  }
  closedir(d);
  double sum = 0;
  for (auto &p : procs) {
    int q = p.first;
    for (int hop = 0; q > 1 && hop < 64; hop++) {
      if (std::find(roots.begin(), roots.end(), q) != roots.end()) { sum += p.second.second; break; }
      auto it = procs.find(q);
      if (it == procs.end()) break;
      q = it->second.first;
    }
  }
  return sum;
}
inline double self_cpu_seconds() {
  rusage u;
  getrusage(RUSAGE_SELF, &u);
  return double(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * double(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

// ---------------------------------------------------------------- arrivals
// Times of a recorded arrival process, in seconds from the start of the load.
inline std::vector<double> read_arrivals(const std::string &name) {
  std::vector<double> at;
  FILE *f = fopen(name.c_str(), "rb");
  if (!f) die("cannot read " + name);
  double x;
  if (name.size() > 4 && name.compare(name.size() - 4, 4, ".f64") == 0) {
    while (fread(&x, sizeof x, 1, f) == 1) at.push_back(x);
  } else {
    while (fscanf(f, "%lf", &x) == 1) at.push_back(x);
    if (!feof(f)) die(name + ": line " + std::to_string(at.size() + 1) + " is not a number");
  }
  fclose(f);
  if (at.empty()) die(name + " holds no arrivals");
  if (at.front() < 0 || !std::is_sorted(at.begin(), at.end())) die(name + ": arrivals must ascend from 0");
  return at;
}

struct Arrivals {
  double mean_ns = 0, t = 0;
  bool poisson = true;
  std::mt19937_64 g;
  std::exponential_distribution<double> e{1.0};
  std::vector<double> recorded;
  size_t at = 0;
  int64_t base = 0;
  void init(const Options &o, int64_t start) {
    base = start;
    if (!o.arrivals.empty()) { recorded = read_arrivals(o.arrivals); return; }
    mean_ns = 1e9 / o.rate; poisson = o.dist != "constant"; g.seed(o.seed); t = 0;
    step();
  }
  void step() {
    if (!recorded.empty()) at++;
    else t += poisson ? e(g) * mean_ns : mean_ns;
  }
  int64_t next() const {
    if (recorded.empty()) return base + int64_t(t);
    return at < recorded.size() ? base + int64_t(recorded[at] * 1e9) : INT64_MAX;
  }
};

// One request as --records writes it: 32 bytes, native byte order. Times count from the start of the load.
struct Record {
  uint32_t index;      // 0, 1, ... in the order of intended times
  int16_t status;      // gRPC or HTTP status; -1 connection, -2 client_drop, -3 unfinished
  uint16_t rows;       // 0 unless --rows was given
  int64_t intended_ns;
  int64_t lag_ns;      // actual minus intended send time
  int64_t latency_ns;  // answer minus intended send time; -1: no answer
};
static_assert(sizeof(Record) == 32, "readers rely on the layout");

// ---------------------------------------------------------------- results
// Status codes: gRPC numbers for grpc; HTTP codes for http1; below zero: from this client.
enum { ST_CONN = -1, ST_CLIENT_DROP = -2, ST_UNFINISHED = -3 };

struct Stats {
  int64_t win0 = 0, win1 = 0;  // measured window
  std::vector<float> ok_ms, err_ms, lag_us;
  std::map<int, long> errors;
  long sent = 0, ok = 0, good = 0, done_in_window = 0;
  double cpu0 = 0, cpu1 = 0, self0 = 0, self1 = 0;
  int64_t cpu_t0 = 0, cpu_t1 = 0;
  bool sampled0 = false, sampled1 = false;
  double slo_ms = 0;
  void sample(const Options &o, int64_t t) {
    if (!sampled0 && t >= win0) { sampled0 = true; cpu0 = tree_cpu_seconds(o.pids); self0 = self_cpu_seconds(); cpu_t0 = now_ns(); }
    if (!sampled1 && t >= win1) { sampled1 = true; cpu1 = tree_cpu_seconds(o.pids); self1 = self_cpu_seconds(); cpu_t1 = now_ns(); }
  }
  bool in_window(int64_t intended) const { return intended >= win0 && intended < win1; }
  void on_sent(int64_t intended, int64_t actual) {
    if (!in_window(intended)) return;
    sent++;
    lag_us.push_back(float(actual - intended) * 1e-3f);
  }
  void on_done(int64_t intended, int64_t t, int status, int ok_status) {
    if (t >= win0 && t < win1 && status == ok_status) done_in_window++;
    if (!in_window(intended)) return;
    float ms = float(t - intended) * 1e-6f;
    if (status == ok_status) {
      ok++;
      ok_ms.push_back(ms);
      if (slo_ms <= 0 || ms <= slo_ms) good++;
    } else {
      errors[status]++;
      err_ms.push_back(ms);
    }
  }
};

inline double pct(std::vector<float> &v, double q) {
  if (v.empty()) return NAN;
  size_t i = size_t(ceil(q * double(v.size())));
  return v[i ? i - 1 : 0];
}
inline std::string jnum(double v) {
  if (std::isnan(v)) return "null";
  char b[40];
  snprintf(b, sizeof b, "%.6g", v);
  return b;
}
inline const char *status_name(int s, bool grpc) {
  static const char *g[] = {"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
                            "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
                            "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
                            "UNAUTHENTICATED"};
  if (s == ST_CONN) return "connection";
  if (s == ST_CLIENT_DROP) return "client_drop";
  if (s == ST_UNFINISHED) return "unfinished";
  if (grpc && s >= 0 && s <= 16) return g[s];
  static thread_local char b[16];
  snprintf(b, sizeof b, "%d", s);
  return b;
}

inline void report(const Options &o, Stats &s) {
  auto lat = [](std::vector<float> &v) {
    std::sort(v.begin(), v.end());
    double sum = 0;
    for (float f : v) sum += f;
    return "{\"mean\":" + jnum(v.empty() ? NAN : sum / double(v.size())) + ",\"p50\":" + jnum(pct(v, .5)) +
           ",\"p90\":" + jnum(pct(v, .9)) + ",\"p99\":" + jnum(pct(v, .99)) + ",\"p999\":" + jnum(pct(v, .999)) +
           ",\"max\":" + jnum(v.empty() ? NAN : v.back()) + "}";
  };
  double wall = double(s.win1 - s.win0) * 1e-9, cpuwall = double(s.cpu_t1 - s.cpu_t0) * 1e-9;
  std::string j = "{";
  j += "\"name\":\"" + o.name + "\",\"model\":\"" + o.model + "\",\"protocol\":\"" + o.protocol + "\"";
  j += ",\"mode\":\"" + std::string(o.open() ? "open" : "closed") + "\"";
  j += ",\"offered_rps\":" + (o.rate > 0 ? jnum(o.rate) : o.open() ? jnum(double(s.sent) / wall) : "null");
  j += ",\"concurrency\":" + (o.open() ? std::string("null") : std::to_string(o.concurrency));
  j += ",\"connections\":" + std::to_string(o.connections) + ",\"window_s\":" + jnum(wall);
  j += ",\"sent\":" + std::to_string(s.sent) + ",\"ok\":" + std::to_string(s.ok);
  j += ",\"errors\":{";
  bool first = true;
  for (auto &e : s.errors) {
    j += std::string(first ? "" : ",") + "\"" + status_name(e.first, o.protocol == "grpc") + "\":" + std::to_string(e.second);
    first = false;
  }
  j += "},\"ok_rps\":" + jnum(double(s.done_in_window) / wall);
  j += ",\"latency_ms\":" + lat(s.ok_ms) + ",\"error_latency_ms\":" + lat(s.err_ms);
  j += ",\"send_lag_us\":" + lat(s.lag_us);
  j += ",\"slo_ms\":" + (o.slo_ms > 0 ? jnum(o.slo_ms) : "null");
  j += ",\"goodput_rps\":" + (o.slo_ms > 0 ? jnum(double(s.good) / wall) : "null");
  j += ",\"goodput_frac\":" + (o.slo_ms > 0 && s.sent ? jnum(double(s.good) / double(s.sent)) : "null");
  bool c = !o.pids.empty() && s.sampled1;
  j += ",\"server_cpu_us_per_req\":" + (c && s.done_in_window ? jnum((s.cpu1 - s.cpu0) / double(s.done_in_window) * 1e6) : "null");
  j += ",\"server_cpu_cores\":" + (c ? jnum((s.cpu1 - s.cpu0) / cpuwall) : "null");
  j += ",\"client_cpu_us_per_req\":" + (s.sampled1 && s.done_in_window ? jnum((s.self1 - s.self0) / double(s.done_in_window) * 1e6) : "null");
  j += ",\"client_cpu_cores\":" + (s.sampled1 ? jnum((s.self1 - s.self0) / cpuwall) : "null");
  j += "}\n";
  FILE *f = o.out.empty() ? stdout : fopen(o.out.c_str(), "w");
  if (!f) die("cannot write " + o.out);
  fputs(j.c_str(), f);
  if (f != stdout) fclose(f);
}
