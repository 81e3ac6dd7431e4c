import type { Command } from 'commander'
import { writeWhole } from '../../support/files.js'
import { shownText, toName } from '../../text.js'
import { gatherFacts } from '../facts.js'
import { reportPage } from '../format/report-page.js'
import { oneFile, SOURCES, takeDriverSyntax, takeMember, takeParent } from '../grammar.js'
import { formatOf, withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { refuseFilesOf } from '../survey.js'

interface ReportArguments {
  readonly format?: string
  readonly write?: string
  readonly forceShare?: boolean
}

export function declareReport(program: Command, run: Runner): void {
  const command = program
    .command('report')
    .summary('show all there is to know about an image as a page for a browser')
    .description(
      'Write one HTML file that needs nothing but itself: the allocation to zoom into, fragmentation, the backing chain, snapshots and what each ' +
        'holds alone, bitmaps, and what compacting would win. Reads metadata only, and changes nothing.',
    )
    .usage('[options] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option('-o, --write <file>', 'write the page into this file (default: the standard output)')
    .option('-U, --force-share', 'open an image that another process uses')
  takeMember(command)
  takeParent(command)
  takeDriverSyntax(command)
  command.action((files: string[], options: ReportArguments) =>
    run(session => report(oneFile(files), options, session)),
  )
}

async function report(filename: string, options: ReportArguments, session: Session): Promise<number> {
  const { forceShare, write } = options
  const format = await formatOf(filename, options.format, session)
  const opening = { filename, format, forceShare, closed: true }
  await withImage(opening, session, async image => {
    if (write !== undefined) await refuseFilesOf(image, write, 'report')
    const facts = await gatherFacts(image, opening, session)
    // A page is text.
    const page = shownText(reportPage(facts))
    if (write === undefined) session.stdout.write(page)
    else await writeWhole(toName(write), page)
  })
  return 0
}
