/**
 * SIGUSR1, and SIGINFO where the system has it (Control-T on BSD and macOS), ask a job how far it is. Nobody may ask before this module
 * is loaded: until then Node answers SIGUSR1 by opening its debugger on a port, so it is the first that is loaded, and a job closes what was
 * opened before. Without a job nothing is answered, and never is the process ended.
 */

const SIGNALS = ['SIGUSR1', 'SIGINFO'] as const

/** Calls `answer` whenever somebody asks, until the returned function is called. */
export function whenAsked(answer: () => void): () => void {
  for (const signal of SIGNALS) process.on(signal, answer)
  return () => {
    for (const signal of SIGNALS) process.off(signal, answer)
  }
}

/** Closes the port that a signal opened before this module was there: any user of this machine could make the job do what it likes. */
export function endStrayDebugger(): void {
  const { execArgv, env, getBuiltinModule } = process
  // Whoever wants a debugger says so.
  if ([...execArgv, env['NODE_OPTIONS'] ?? ''].some(given => /--inspect|--require|-r\b|--import/.test(given))) return
  const debug = getBuiltinModule('node:inspector')
  if (debug.url() !== undefined) debug.close()
}

// Never taken away: without a listener the signal would end the process.
whenAsked(() => undefined)
