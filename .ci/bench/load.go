package main

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// load is clients in rooms of one size, on one server.
type load struct {
	*process
	*reader
	rooms   [][]*client
	next    atomic.Int64 // the number of the next message: none is used twice
	dialing struct {
		took, cpu time.Duration
	}
}

// connect has clients join, so many at a time.
func connect(p *process, clients, perRoom, atOnce int) (*load, error) {
	r, err := newReader()
	if err != nil {
		return nil, err
	}
	l := &load{process: p, reader: r, rooms: make([][]*client, (clients+perRoom-1)/perRoom)}
	all := make([]*client, clients)
	failed := make(chan error, clients)
	turns := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	since, cpu := time.Now(), p.cpu()
	for i := range clients {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			c, err := dial(p.server, i, i/perRoom)
			if err == nil {
				all[i], err = c, r.add(c)
			}
			if err != nil {
				failed <- err
			}
		})
	}
	wg.Wait()
	l.dialing.took, l.dialing.cpu = time.Since(since), p.cpu()-cpu
	for i, c := range all {
		l.rooms[i/perRoom] = append(l.rooms[i/perRoom], c)
	}
	if len(failed) > 0 {
		l.close()
		return nil, fmt.Errorf("%d of %d did not get in: %w", len(failed), clients, <-failed)
	}
	return l, nil
}

// sent is what was posted in one phase, by each publisher.
type sent [][]int

// posting says how.
type posting struct {
	publishers int
	kept       bool          // their connections
	rate       int           // messages a second of all publishers; 0: each posts when it has the answer
	lasts      time.Duration // or until each room has had one message, if that is 0
}

// outcome is what a phase gave.
type outcome struct {
	messages, deliveries int
	took                 time.Duration // until all was delivered
	cpu                  time.Duration // of the server
	times                []time.Duration
}

func (o outcome) perDelivery() float64 { return micros(o.cpu) / float64(o.deliveries) }
func (o outcome) perMessage() float64  { return micros(o.cpu) / float64(o.messages) }
func (o outcome) rate() float64        { return float64(o.messages) / o.took.Seconds() }

// late returns how many milliseconds so much of all deliveries took at most.
func (o outcome) late(part float64) float64 {
	return micros(o.times[int(part*float64(len(o.times)-1))]) / 1000
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// post posts to one room after the other, waits for all deliveries, and checks them.
func (l *load) post(how posting) (o outcome, err error) {
	all := make(sent, how.publishers)
	failed := make(chan error, how.publishers)
	runtime.GC() // and not while times are taken
	l.begin(how.rate > 0)
	var wg sync.WaitGroup
	since, cpu := time.Now(), l.cpu()
	for p := range how.publishers {
		wg.Go(func() {
			publisher := &publisher{server: l.server, number: p, kept: how.kept}
			defer publisher.close()
			for turn := p; ; turn += how.publishers {
				due := time.Now()
				if how.rate > 0 {
					at := since.Add(time.Duration(turn) * time.Second / time.Duration(how.rate))
					if at.Sub(since) >= how.lasts {
						return
					}
					if wait := at.Sub(due); wait > 0 {
						time.Sleep(wait)
						due = time.Now()
					} else {
						due = at // the post before it took so long: that counts, else a slow server would be asked less
					}
				} else if how.lasts > 0 && time.Since(since) >= how.lasts || how.lasts == 0 && turn >= len(l.rooms) {
					return
				}
				id := int(l.next.Add(1)) - 1
				if err := publisher.post(roomName(id%len(l.rooms)), id, due); err != nil {
					failed <- fmt.Errorf("post: %w", err)
					return
				}
				all[p] = append(all[p], id)
			}
		})
	}
	wg.Wait()
	for _, ids := range all {
		o.messages += len(ids)
		for _, id := range ids {
			o.deliveries += len(l.rooms[id%len(l.rooms)])
		}
	}
	if len(failed) > 0 {
		return o, <-failed
	}
	err = l.wait(o.deliveries)
	o.took, o.cpu = time.Since(since), l.cpu()-cpu
	if wrong := l.check(all); wrong != nil {
		return o, wrong
	}
	l.mu.Lock()
	o.times = l.times
	l.mu.Unlock()
	slices.Sort(o.times)
	return o, err
}

// check compares what each client got with what was posted to its room: all of it, once, in one order for all, which is that
// of each publisher. Then it forgets what they got: what comes later is foreign to the next phase.
func (l *load) check(all sent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	by := make(map[uint32]int)
	want := make([][]uint32, len(l.rooms))
	for publisher, ids := range all {
		for _, id := range ids {
			by[uint32(id)] = publisher
			want[id%len(l.rooms)] = append(want[id%len(l.rooms)], uint32(id))
		}
	}
	var lost, twice, foreign, disorder int
	for room, clients := range l.rooms {
		slices.Sort(want[room])
		for _, c := range clients {
			got := slices.Clone(c.got)
			slices.Sort(got)
			unique := slices.Compact(slices.Clone(got))
			twice += len(got) - len(unique)
			for _, id := range unique {
				if _, ok := slices.BinarySearch(want[room], id); !ok {
					foreign++
				}
			}
			for _, id := range want[room] {
				if _, ok := slices.BinarySearch(unique, id); !ok {
					lost++
				}
			}
			if !slices.Equal(got, want[room]) {
				continue // its order says nothing
			}
			latest := make(map[int]uint32)
			for i, id := range c.got {
				if id < latest[by[id]] || id != clients[0].got[i] && len(clients[0].got) == len(c.got) {
					disorder++
					break
				}
				latest[by[id]] = id
			}
		}
	}
	for _, clients := range l.rooms {
		for _, c := range clients {
			c.got = c.got[:0]
		}
	}
	if lost+twice+foreign+disorder+l.gone > 0 {
		return fmt.Errorf("%d lost, %d twice, %d foreign, %d clients with another order, %d clients cut off", lost, twice, foreign, disorder, l.gone)
	}
	return nil
}
