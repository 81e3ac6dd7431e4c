/**
 * SIGUSR1, and SIGINFO where the system has it (Control-T on BSD and macOS), ask a job how far it is. Nobody may ask before this module
 * is loaded: until then Node answers SIGUSR1 by opening its debugger on a port, so it is the first that is loaded. Without a job nothing
 * is answered, and never is the process ended.
 */

const SIGNALS = ['SIGUSR1', 'SIGINFO'] as const

/** Calls `answer` whenever somebody asks, until the returned function is called. */
export function whenAsked(answer: () => void): () => void {
  for (const signal of SIGNALS) process.on(signal, answer)
  return () => {
    for (const signal of SIGNALS) process.off(signal, answer)
  }
}

// Never taken away: without a listener the signal would end the process.
whenAsked(() => undefined)
