package main

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
)

// grow measures one server with each number of clients, each time from its start. Another number is the first in each round:
// else what the machine does meanwhile would pass for the number's effect.
func (b *bench) grow(s *server, round int) error {
	sizes := strings.Split(*growth, ",")
	for i := range sizes {
		size := sizes[(i+round)%len(sizes)]
		n, err := strconv.Atoi(size)
		if err != nil {
			return err
		}
		if err := b.growTo(s, n); err != nil {
			return fmt.Errorf("%d clients: %w", n, err)
		}
	}
	return nil
}

func (b *bench) growTo(s *server, n int) error {
	p, err := start(s)
	if err != nil {
		return err
	}
	defer func() { p.stop() }()
	time.Sleep(time.Second) // for what a start leaves to be done
	empty := p.resident()
	l, err := connect(p, n, perRoom, atOnce)
	if err != nil {
		return err
	}
	defer l.close()
	time.Sleep(3 * time.Second) // for the collectors
	full := p.resident()
	row := fmt.Sprintf("%d clients: ", n)
	b.note(row+"MB", full/1e6)
	b.note(row+"KB a client", (full-empty)/1e3/float64(n))
	b.note(row+"µs a handshake with its join", micros(l.dialing.cpu)/float64(n))
	b.note(row+"handshakes/s", float64(n)/l.dialing.took.Seconds())
	sent, err := l.post(posting{publishers: 16, kept: true, rate: 1000, lasts: time.Duration(*seconds * float64(time.Second))})
	if err != nil {
		return err
	}
	b.note(row+"µs a delivery, rooms of 5, 1,000 messages/s", sent.perDelivery())
	b.note(row+"the same: p99 ms", sent.late(.99))

	took, cpu, next, err := l.restart()
	if next != nil {
		p = next
	}
	if err != nil {
		return fmt.Errorf("restart: %w", err)
	}
	b.note(row+"s until all are back", took.Seconds())
	b.note(row+"µs a handshake, the restart's", micros(cpu)/float64(n))
	_, err = l.post(posting{publishers: 4, kept: true}) // each of them hears its room again
	return err
}

// restart stops the server and starts it again, and has the clients come back as socket.io-client does: it waits for a second,
// and after each failure twice as long, up to five, each time give or take a half. cpu leaves out what the server's own start
// takes: Node's 0.45 s would be 450 µs of each of 1,000.
func (l *load) restart() (took, cpu time.Duration, p *process, err error) {
	n := len(l.clients)
	lost := make(chan *client, n)
	back := make(chan *client, n)
	l.mu.Lock()
	l.lost = lost
	l.mu.Unlock()
	since := time.Now()
	go func() {
		for range n {
			old := <-lost
			go func() {
				for wait := time.Second; ; wait = min(2*wait, 5*time.Second) {
					time.Sleep(wait/2 + rand.N(wait))
					c, err := dial(old.server, old.number, old.room)
					if err == nil && l.add(c) == nil {
						back <- c
						return
					}
				}
			}()
		}
	}()
	l.stop()
	if p, err = start(l.server); err != nil {
		return 0, 0, nil, err
	}
	started := p.cpu()
	deadline := time.After(2 * time.Minute)
	for i := range n {
		select {
		case c := <-back:
			for j, old := range l.rooms[c.room] {
				if old.number == c.number {
					l.rooms[c.room][j] = c
				}
			}
		case <-deadline:
			return 0, 0, p, fmt.Errorf("%d of %d are back after two minutes", i, n)
		}
	}
	took, cpu = time.Since(since), p.cpu()-started
	l.process = p
	l.mu.Lock()
	l.lost, l.gone = nil, 0
	l.mu.Unlock()
	return took, cpu, p, nil
}
