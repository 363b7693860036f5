package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"
)

// With -front the clients come through nginx. -clients of them stay for the whole time, of ten six by WebSocket, two by
// polling and two upgraded, in rooms of ten, and have to get each message. Meanwhile hostile ones come from two other
// addresses: row by row of what the daemon was attacked with once (issue 13). .ci/deploy/attack calls it.
var (
	front    = flag.String("front", "", "nginx's host:port, for an attack through it")
	ca       = flag.String("ca", "", "its certificate")
	domain   = flag.String("domain", "yourdomain.com", "the certificate's")
	nginx    = flag.String("nginx", "", "nginx's process ids")
	nginxLog = flag.String("nginx-log", "", "its error.log")
	length   = flag.Duration("row", 25*time.Second, "how long each row lasts")
	rest     = flag.Duration("rest", time.Minute, "within which everybody hostile has to be gone")
	only     = flag.String("only", "12345678", "the rows")
)

// Bounds in each row: what the unit says of 10,000 clients, of one of them, and of the daemon with the kernel's part.
const (
	maxResident = 208  // MB
	perSession  = 13.4 // KB
	maxMemory   = 384  // MiB
	maxNginx    = 300  // MB: 1,000 connections of each of two addresses and 1,300 of live clients, 51 KB each, and as much for bodies and headers
	maxNginxTCP = 300  // MB: for 300 who read nothing, 256 KiB towards each, 128 KiB from the daemon, and as much again
)

type row struct {
	name    string
	clients int
	kinds   []kind
	every   time.Duration // between two messages to those of them who join a room
	size    int           // bytes of one
	growth  float64       // MB that the daemon's resident memory may take besides perSession: for rows 1, 4 and 5 what may wait for all
}

var rows = []row{
	{"1 refused joins", 800, kinds[0:1], time.Second, long, 67},
	{"2 endless headers, many headers", 600, kinds[1:3], time.Second, long, 30},
	{"3 unread polls", 200, kinds[3:4], 4 * time.Second, 900_000, 10},
	{"4 unread WebSockets", 300, kinds[4:5], time.Second / 4, 50_000, 67},
	{"5 all of them", 800, kinds, time.Second / 4, 50_000, 97},
	{"6 idle connections", 500, kinds[5:6], time.Second, long, 10},
	{"7 joins by name, whispers", 600, kinds[9:11], time.Second, long, 67},
	{"8 a hundred polls on a connection, by HTTP/2", 8, streamKinds, time.Second / 4, 50_000, 67},
}

func besiege() error {
	certificate, err := os.ReadFile(*ca)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certificate)
	through := &tls.Config{RootCAs: pool, ServerName: *domain}

	live := newSoak(time.Hour, *clients/perRoom)
	live.to, live.from, live.addresses, live.tls, live.clocked = *front, "127.0.4.1", 10, through, true
	var joined, members, publishing sync.WaitGroup
	joined.Add(*clients)
	for i := range *clients {
		members.Go(func() { live.member(i, joined.Done) })
		time.Sleep(2 * time.Millisecond)
	}
	joined.Wait()
	for p := range publishers {
		publishing.Go(func() { live.publishSome(p, *rate) })
	}
	fmt.Printf("%d live clients\n", *clients)

	var wrong, table []string
	for _, r := range rows {
		if strings.Contains(*only, r.name[:1]) {
			time.Sleep(5 * time.Second) // of quiet, for the latency before
			line, broken := live.suffer(r)
			table, wrong = append(table, line), append(wrong, broken...)
		}
	}
	live.stopped.Store(true)
	publishing.Wait()
	time.Sleep(3 * time.Second) // for the last message to arrive
	close(live.over)
	members.Wait()
	fmt.Printf("live clients: %d messages posted, %d handed to them, %d read by them\n", live.posts.Load(), live.handed.Load(), live.read.Load())
	if live.read.Load() != live.posts.Load()*perRoom {
		wrong = append(wrong, fmt.Sprintf("live clients read %d messages, want %d", live.read.Load(), live.posts.Load()*perRoom))
	}
	for fault, n := range live.faults {
		wrong = append(wrong, fmt.Sprintf("live clients: %d × %s", n, fault))
	}
	fmt.Println("| row | daemon, MB | nginx, MB | TCP memory of the daemon, MB | of nginx, towards it | of nginx, towards clients | of this machine | connections | dropped | refused by nginx | p50 / p99 / max before, ms | meanwhile |")
	fmt.Println("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	fmt.Println(strings.Join(table, "\n"))
	if wrong != nil {
		return fmt.Errorf("%s", strings.Join(wrong, "\n      "))
	}
	return nil
}

// suffer has a row's hostile clients come, beside the live ones. It returns a line of the table, and what went wrong.
func (s *soak) suffer(r row) (line string, wrong []string) {
	quiet := s.latencies()
	before, logged := s.survey(), logSize()
	s.latencies()

	enemy := newSoak(*length, 1e6)
	enemy.to, enemy.from, enemy.addresses, enemy.tls = *front, "127.0.5.1", 2, s.tls
	var enemies sync.WaitGroup
	for i := range r.clients {
		enemies.Go(func() {
			time.Sleep(time.Duration(i) * 5 * time.Second / time.Duration(r.clients))
			enemy.attack(i, r.kinds)
		})
	}
	enemies.Go(func() { enemy.publish(r.every, r.size, func() int { return enemy.rooms }) })
	peak := before
	for time.Now().Before(enemy.end) {
		peak = peak.max(s.survey())
		time.Sleep(500 * time.Millisecond)
	}
	latency := s.latencies()
	enemies.Wait()
	ended := time.Now()
	after := s.survey()
	for (after.Connections != before.Connections || after.rss > before.rss+10) && time.Since(ended) < *rest {
		time.Sleep(time.Second)
		after = s.survey()
	}

	check := func(broken bool, format string, args ...any) {
		if broken {
			wrong = append(wrong, "row "+r.name+": "+fmt.Sprintf(format, args...))
		}
	}
	fmt.Printf("row %s:\n  before %v\n  peak   %v\n  %3.0f s after the end %v\n", r.name, before, peak, time.Since(ended).Seconds(), after)
	for _, k := range r.kinds {
		fmt.Printf("  %4d %s; %d cut off\n", enemy.hostile[k.name].done, k.name, enemy.hostile[k.name].cut)
		check(enemy.hostile[k.name].done == 0, "not tried: who %s", k.name)
	}
	requests, connections := refusals(logged)
	fmt.Printf("  %d not let in, %d cut off for not reading; nginx refused %d requests and %d connections\n", enemy.refused, peak.Dropped-before.Dropped, requests, connections)
	for fault, n := range enemy.faults {
		wrong = append(wrong, fmt.Sprintf("row %s: %d × %s", r.name, n, fault))
	}
	fmt.Printf("  latency before: %v; meanwhile: %v\n", quiet, latency)
	line = fmt.Sprintf("| %s | %.0f → %.0f | %.0f → %.0f | %.0f | %.0f | %.0f | %.0f | %d → %d | %d | %d | %v | %v |", r.name,
		before.rss, peak.rss, before.nginx, peak.nginx, peak.daemonTCP, peak.towardsTCP, peak.nginxTCP, peak.allTCP,
		before.Connections, peak.Connections, peak.Dropped-before.Dropped, requests+connections, quiet, latency)

	sessions := float64(peak.Connections-before.Connections) * perSession / 1000
	check(peak.rss-before.rss > r.growth+sessions, "the daemon's memory grew by %.0f MB, over %.0f and %.0f for its sessions", peak.rss-before.rss, r.growth, sessions)
	check(peak.rss > maxResident, "the daemon's memory was %.0f MB, over %d", peak.rss, maxResident)
	check(peak.rss+peak.daemonTCP > maxMemory*1.048576, "the daemon's memory and its TCP memory were %.0f MB, over %d MiB", peak.rss+peak.daemonTCP, maxMemory)
	check(peak.nginx > maxNginx, "nginx's memory was %.0f MB, over %d", peak.nginx, maxNginx)
	check(peak.towardsTCP+peak.nginxTCP > maxNginxTCP, "nginx's TCP memory was %.0f MB, over %d", peak.towardsTCP+peak.nginxTCP, maxNginxTCP)
	check(after.Connections != before.Connections, "%d connections after %v, and %d before", after.Connections, *rest, before.Connections)
	return line, wrong
}

// member is a live client that stays, and has to hear its room's messages from the first on.
func (s *soak) member(i int, joined func()) {
	c, err := s.newClient(i%10 >= 6)
	if err == nil {
		err = c.connect()
	}
	if err == nil {
		err = c.join(i / perRoom)
	}
	if err == nil && i%10 >= 8 {
		err = c.upgrade()
	}
	joined()
	if err == nil {
		c.rooms[i/perRoom].next = 0
	}
	for err == nil {
		select {
		case <-s.over:
			c.t.leave(false)
			return
		default:
			err = c.listen(time.Now().Add(time.Second))
		}
	}
	s.fault(err)
	if c != nil {
		c.t.leave(false)
	}
}

// clock keeps how long messages took.
type clock []time.Duration

func (c clock) String() string {
	if len(c) == 0 {
		return "none"
	}
	slices.Sort(c)
	at := func(q float64) float64 { return float64(c[int(q*float64(len(c)-1))].Microseconds()) / 1000 }
	return fmt.Sprintf("%.1f / %.0f / %.0f", at(0.5), at(0.99), at(1))
}

func (s *soak) took(d time.Duration) {
	if s.clocked {
		s.mu.Lock()
		s.times = append(s.times, d)
		s.mu.Unlock()
	}
}

// latencies are those since the last call.
func (s *soak) latencies() clock {
	s.mu.Lock()
	defer s.mu.Unlock()
	times := s.times
	s.times = nil
	return times
}

// figures of the machine under attack; memory in MB.
type figures struct {
	state
	nginx, daemonTCP, towardsTCP, nginxTCP, allTCP float64 // towards: nginx to the daemon
}

func (f figures) String() string {
	return fmt.Sprintf("daemon %.1f MB, %d connections, %d files; nginx %.1f MB; TCP %.1f MB for the daemon, %.1f for nginx towards it and %.1f towards clients, %.1f on this machine",
		f.rss, f.Connections, f.files, f.nginx, f.daemonTCP, f.towardsTCP, f.nginxTCP, f.allTCP)
}

// survey looks at all of it.
func (s *soak) survey() (f figures) {
	var err error
	if f.state, err = look(); err != nil {
		s.fault(err)
	}
	for _, pid := range strings.Fields(*nginx) {
		rollup, _ := os.ReadFile("/proc/" + pid + "/smaps_rollup") // Pss: its workers share what they have not changed
		_, pss, _ := strings.Cut(string(rollup), "\nPss:")
		var kb float64
		fmt.Sscan(pss, &kb)
		f.nginx += kb * 1024 / 1e6
	}
	sockstat, _ := os.ReadFile("/proc/net/sockstat")
	_, tcp, _ := strings.Cut(string(sockstat), "\nTCP:")
	_, pages, _ := strings.Cut(tcp, " mem ")
	fmt.Sscan(pages, &f.allTCP)
	f.allTCP *= float64(os.Getpagesize()) / 1e6

	_, daemonPort, _ := strings.Cut(*addr, ":")
	_, nginxPort, _ := strings.Cut(*front, ":")
	sockets, _ := exec.Command("ss", "-tnmOH").Output()
	for line := range strings.Lines(string(sockets)) {
		fields := strings.Fields(line)
		_, memory, found := strings.Cut(line, "skmem:(")
		if !found {
			continue
		}
		var bytes float64 // what is charged: received, queued to be sent, and allocated ahead
		for part := range strings.SplitSeq(memory, ",") {
			if name := strings.TrimRight(part, "0123456789"); name == "r" || name == "w" || name == "f" {
				var n float64
				fmt.Sscan(part[1:], &n)
				bytes += n
			}
		}
		switch local, peer := fields[3], fields[4]; {
		case strings.HasSuffix(local, ":"+daemonPort):
			f.daemonTCP += bytes / 1e6
		case strings.HasSuffix(local, ":"+nginxPort):
			f.nginxTCP += bytes / 1e6
		case strings.HasSuffix(peer, ":"+daemonPort):
			f.towardsTCP += bytes / 1e6
		}
	}
	return f
}

// refusals counts what nginx has logged since its log had a size.
func refusals(since int) (requests, connections int) {
	log, _ := os.ReadFile(*nginxLog)
	log = log[min(since, len(log)):]
	return strings.Count(string(log), "limiting requests"), strings.Count(string(log), "limiting connections")
}

func logSize() int {
	log, _ := os.ReadFile(*nginxLog)
	return len(log)
}

func (f figures) max(g figures) figures {
	f.rss, f.nginx, f.Connections, f.files, f.Dropped = max(f.rss, g.rss), max(f.nginx, g.nginx), max(f.Connections, g.Connections), max(f.files, g.files), max(f.Dropped, g.Dropped)
	f.daemonTCP, f.towardsTCP, f.nginxTCP, f.allTCP = max(f.daemonTCP, g.daemonTCP), max(f.towardsTCP, g.towardsTCP), max(f.nginxTCP, g.nginxTCP), max(f.allTCP, g.allTCP)
	return f
}
