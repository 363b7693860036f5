// Command bench puts the same load on the daemon and on the servers that a team would take in its place, and prints a table.
// .ci/bench/run builds it and them.
//
//	bench -bin DIR [-rounds 5] [-seconds 4] [-servers daemon,Centrifugo]     the README's table
//	bench -bin DIR -growth 1000,5000,10000,19000 [-rounds 3]                what grows with the number of clients
//	bench -bin DIR -quick                                                   is anything lost, twice or out of order?
//
// In each round every server has its turn, and another is the first. A figure is the median of the rounds, and all of them are
// printed below the table. The load shares the machine's cores with the server: trust the ratios within one run.
//
// It ends with 1 where anybody lost a message, had one twice or in another order than the others, or was cut off. No time
// makes it fail.
package main

import (
	"flag"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
)

var (
	bin     = flag.String("bin", "", "the folder with the servers, which run has built")
	rounds  = flag.Int("rounds", 5, "rounds")
	seconds = flag.Float64("seconds", 4, "that each load lasts")
	names   = flag.String("servers", "", "these alone, by their names in the table")
	large   = flag.Int("room", 1000, "clients in the large room")
	clients = flag.Int("clients", 5000, "clients in rooms of 5")
	growth  = flag.String("growth", "", "numbers of clients: measure what grows with them")
	quick   = flag.Bool("quick", false, "one short round")
	rows    = flag.String("loads", "", "only these: paced, large, small, fpm")
	also    = flag.String("also", "", "more builds of the daemon, each as name=path, with spaces between them")
)

const (
	perRoom = 5
	atOnce  = 100 // clients that connect at the same time
)

func main() {
	flag.Parse()
	if *quick {
		*rounds, *seconds, *large, *clients = 1, 1, 300, 500
	}
	debug.SetGCPercent(-1) // the load's own collector runs between the loads (post)
	debug.SetMemoryLimit(4 << 30)
	port, err := freePort()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	chosen := slices.DeleteFunc(servers(*bin, port), func(s *server) bool {
		return *names != "" && !strings.Contains(*also, s.name+"=") && !slices.Contains(strings.Split(*names, ","), s.name)
	})
	for _, name := range strings.Split(*names, ",") {
		if name != "" && !slices.ContainsFunc(chosen, func(s *server) bool { return s.name == name }) {
			fmt.Fprintf(os.Stderr, "bench: %q is asked for, and is not there\n", name)
			os.Exit(1)
		}
	}
	b := &bench{values: make(map[string][]float64)}
	b.run(chosen)
	b.print(chosen)
	for _, fault := range b.faults {
		fmt.Println("FAULT:", fault)
	}
	if len(b.faults) > 0 || len(chosen) == 0 {
		os.Exit(1)
	}
}

func freePort() (int, error) {
	listener, err := net.Listen("tcp", host+":0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

// bench is what was measured.
type bench struct {
	rows   []string // in the order in which they came up
	values map[string][]float64
	faults []string
	turn   string // the server that has it
}

func (b *bench) run(chosen []*server) {
	for round := range *rounds {
		for i := range chosen {
			s := chosen[(i+round)%len(chosen)]
			b.turn = s.name
			since, others := time.Now(), busy()-own()
			var err error
			if *growth == "" {
				err = b.compare(s)
			} else {
				err = b.grow(s, round)
			}
			b.note("cores that other programs had", (busy()-own()-others).Seconds()/time.Since(since).Seconds())
			if err != nil {
				b.faults = append(b.faults, fmt.Sprintf("%s, round %d: %v", s.name, round+1, err))
			}
			fmt.Fprintf(os.Stderr, "round %d: %s took %.0f s\n", round+1, s.name, time.Since(since).Seconds())
		}
	}
}

// note keeps a figure of the server whose turn it is.
func (b *bench) note(row string, value float64) {
	if !slices.Contains(b.rows, row) {
		b.rows = append(b.rows, row)
	}
	b.values[row+b.turn] = append(b.values[row+b.turn], value)
}

func wanted(load string) bool { return *rows == "" || slices.Contains(strings.Split(*rows, ","), load) }

// compare is one server's turn.
func (b *bench) compare(s *server) error {
	lasts := time.Duration(*seconds * float64(time.Second))
	if wanted("paced") || wanted("large") {
		p, err := start(s)
		if err != nil {
			return err
		}
		defer p.stop()
		if err := b.largeRoom(p, lasts); err != nil {
			return fmt.Errorf("large room: %w", err)
		}
		p.stop()
	}
	if wanted("small") || wanted("fpm") {
		p, err := start(s)
		if err != nil {
			return err
		}
		defer p.stop()
		if err := b.smallRooms(p, lasts); err != nil {
			return fmt.Errorf("rooms of %d: %w", perRoom, err)
		}
	}
	return nil
}

func (b *bench) largeRoom(p *process, lasts time.Duration) error {
	l, err := connect(p, *large, *large, atOnce)
	if err != nil {
		return err
	}
	defer l.close()
	room := fmt.Sprintf("room of %d, ", *large)
	if wanted("paced") {
		paced, err := l.post(posting{publishers: 4, kept: true, rate: 10, lasts: lasts})
		if err != nil {
			return err
		}
		b.note(room+"10 messages/s: µs a delivery", paced.perDelivery())
	}
	if !wanted("large") {
		return nil
	}
	four, err := l.post(posting{publishers: 4, kept: true, lasts: lasts})
	if err != nil {
		return err
	}
	b.note(room+"4 publishers: µs a delivery", four.perDelivery())
	sixteen, err := l.post(posting{publishers: 16, kept: true, lasts: lasts})
	if err != nil {
		return err
	}
	b.note(room+"16 publishers: messages/s", sixteen.rate())
	b.note(room+"16 publishers: µs a delivery", sixteen.perDelivery())
	_, err = l.post(posting{publishers: 1, kept: true}) // and nothing came late
	return err
}

func (b *bench) smallRooms(p *process, lasts time.Duration) error {
	time.Sleep(time.Second) // for what a start leaves to be done
	empty := p.resident()
	l, err := connect(p, *clients, perRoom, atOnce)
	if err != nil {
		return err
	}
	defer l.close()
	time.Sleep(3 * time.Second) // for the collectors
	b.note("MB empty", empty/1e6)
	b.note("KB a client", (p.resident()-empty)/1e3/float64(*clients))
	b.note("µs a handshake with its join", micros(l.dialing.cpu)/float64(*clients))
	for _, way := range []struct {
		name, load string
		kept       bool
	}{{"", "small", true}, {", a connection for each post", "fpm", false}} {
		if !wanted(way.load) {
			continue
		}
		room := fmt.Sprintf("rooms of %d%s", perRoom, way.name)
		many, err := l.post(posting{publishers: 16, kept: way.kept, lasts: lasts})
		if err != nil {
			return err
		}
		b.note(room+", 16 publishers: messages/s", many.rate())
		b.note(room+", 16 publishers: µs a message", many.perMessage())
		paced, err := l.post(posting{publishers: 8, kept: way.kept, rate: 200, lasts: lasts})
		if err != nil {
			return err
		}
		b.note(room+", 200 messages/s: µs a message", paced.perMessage())
		b.note(room+", 200 messages/s: p50 ms", paced.late(.5))
		b.note(room+", 200 messages/s: p99 ms", paced.late(.99))
	}
	_, err = l.post(posting{publishers: 1, kept: true}) // and nothing came late
	return err
}

// print prints the table, and each value behind it.
func (b *bench) print(chosen []*server) {
	fmt.Print("\n|")
	for _, s := range chosen {
		fmt.Printf(" | %s", s.name)
	}
	fmt.Printf(" |\n| ---%s |\n", strings.Repeat(" | ---", len(chosen)))
	for _, row := range b.rows {
		fmt.Print("| ", row)
		for _, s := range chosen {
			fmt.Print(" | ", figure(median(b.values[row+s.name])))
		}
		fmt.Println(" |")
	}
	fmt.Print("\nAll values, in the order of the rounds:\n\n")
	for _, row := range b.rows {
		fmt.Println(row)
		for _, s := range chosen {
			fmt.Printf("  %-10s", s.name)
			for _, value := range b.values[row+s.name] {
				fmt.Printf(" %8s", figure(value))
			}
			fmt.Println()
		}
	}
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return -1
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}

// figure prints a number with three digits at least. Nothing that is measured is negative.
func figure(value float64) string {
	switch {
	case value < 0:
		return "–"
	case value < 10:
		return strconv.FormatFloat(value, 'f', 2, 64)
	case value < 100:
		return strconv.FormatFloat(value, 'f', 1, 64)
	}
	return strconv.FormatFloat(value, 'f', 0, 64)
}
